"""Numbers as people read them: three digits, the unit, no surprise at the boundaries."""

import datetime
import math
import re
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcli.formatting import (
    count,
    decimal,
    duration,
    fixed,
    loss,
    moment,
    perplexity,
    plural,
    shares,
    size,
)

UNITS = {
    count: {"": 1, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12},
    size: {" byte": 1, " bytes": 1, " kB": 1e3, " MB": 1e6, " GB": 1e9, " TB": 1e12},
    duration: {" s": 1, " min": 60, " h": 3600, " days": 86400},
}
Kind = Callable[[float], str]
kinds = pytest.mark.parametrize("kind", UNITS)


def value_of(kind: Kind, text: str) -> float:
    """Read a number back."""
    found = re.fullmatch(r"(-?[\d,.]+(?:e[+-]\d+)?)(.*)", text)
    assert found is not None, text
    return float(found[1].replace(",", "")) * UNITS[kind][found[2]]


@kinds
@given(value=st.floats(min_value=-1e17, max_value=1e17))
def test_three_digits_are_right_and_the_unit_is_there(kind: Kind, value: float) -> None:
    least = 0.5 if kind is size else 0.0  # there are no parts of a byte
    assert value_of(kind, kind(value)) == pytest.approx(value, rel=0.00501, abs=least + 1e-300)


@kinds
@given(st.floats(min_value=-1e15, max_value=1e15), st.floats(min_value=-1e15, max_value=1e15))
def test_a_larger_number_never_looks_smaller(kind: Kind, one: float, other: float) -> None:
    low, high = sorted((one, other))
    shown, more = value_of(kind, kind(low)), value_of(kind, kind(high))
    assert shown <= more or shown == pytest.approx(more, rel=1e-12)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"), (7, "7"), (999.5, "1,000"), (9_999, "9,999"), (10_000, "10k"),
        (99_950, "100k"), (136_704, "137k"), (999_400, "999k"), (999_500, "1M"),
        (999_999, "1M"), (124_439_808, "124M"), (1.5e9, "1.5B"), (7e14, "700T"),
        (-136_704, "-137k"), (0.42, "0.42"), (None, "-"), (math.nan, "nan"), (math.inf, "inf"),
    ],
)  # fmt: skip
def test_a_count(number: float | None, text: str) -> None:
    assert count(number) == text


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (999.5, "1 kB"), (9_600_000, "9.6 MB"),
        (999_499, "999 kB"), (999_500, "1 MB"), (999_999, "1 MB"), (31_400_000_000, "31.4 GB"),
        (math.inf, "inf bytes"), (math.nan, "nan bytes"),
    ],
)  # fmt: skip
def test_a_size(n_bytes: float, text: str) -> None:
    assert size(n_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (0.356, "0.356 s"), (43.94, "43.9 s"), (119.4, "119 s"), (120, "2 min"),
        (7_199, "2 h"), (103_320, "28.7 h"), (172_800, "2 days"), (-3, "-3 s"),
        (math.nan, "nan s"), (math.inf, "inf s"),
    ],
)  # fmt: skip
def test_a_time(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_losses_and_perplexities_stay_short_whatever_they_are() -> None:
    assert (loss(4.01594), loss(None), loss(1e30)) == ("4.0159", "-", "1e+30")
    assert (perplexity(4.0159), perplexity(12.5), perplexity(None)) == ("55.47", "268,337", "-")
    assert (perplexity(50), perplexity(1e9), fixed(math.nan, 4)) == ("5.18e+21", "inf", "unknown")


def test_one_thing_is_not_many() -> None:
    assert plural(1, "epoch") == "1 epoch" == plural(1.0, "epoch") == plural(1.0004, "epoch")
    assert plural(0, "step") == "0 steps" and plural(1_234, "step") == "1,234 steps"
    assert plural(5.994, "epoch") == "5.99 epochs" and plural(1, "loss", "losses") == "1 loss"
    assert decimal(1234.5) == "1,230" and decimal(1e-7) == "1e-07"


@pytest.mark.parametrize(
    "zone", ["Europe/Zurich", "Nowhere/At_All", "AAA99999999999999999BBB", "/dev/zero", ":" * 300]
)
def test_any_time_zone_gives_a_time(zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        with monkeypatch.context() as env:
            env.setenv("TZ", zone)
            time.tzset()
            then = datetime.datetime.fromisoformat(moment())
    finally:
        time.tzset()
    assert then.tzinfo is not None
    assert abs(datetime.datetime.now(datetime.UTC) - then) < datetime.timedelta(minutes=1)


def test_shares_are_of_the_sum_largest_first_without_what_is_tiny() -> None:
    parts = {"a": 1.0, "b": 3.0, "c": 0.001}
    assert list(shares(parts).items()) == [("b", "75.0%"), ("a", "25.0%")]
    assert shares({}) == shares({"a": 0.0}) == {}
