"""What people read: counts, bytes, times and losses in a unit that suits them; harmless text.

Three significant digits, and a unit that is never lost.
"""

import contextlib
import datetime
import math
import re
from collections.abc import Mapping, Sequence

NONE = "-"
_COUNTS = ((1, ""), (1e3, "k"), (1e6, "M"), (1e9, "B"), (1e12, "T"))
_SIZES = ((1, " bytes"), (1e3, " kB"), (1e6, " MB"), (1e9, " GB"), (1e12, " TB"))
_TIMES = ((1, " s"), (60, " min"), (3600, " h"), (86400, " days"))
_EXACT_COUNT = 10_000
# C0 without newline and tab, DEL, C1, and the marks that reorder text (CWE-150).
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str, mark: str = "") -> str:
    """Return `text` with `mark` in place of each character that steers a terminal or a page."""
    return _CONTROL.sub(mark, text).encode("utf-8", "replace").decode()


def decimal(value: float) -> str:
    """Return a number with three significant digits; powers of ten only where it is extreme."""
    if not math.isfinite(value) or not value:
        return f"{value:.3g}"
    value = _rounded(value)
    if not 1e-4 <= abs(value) < 1e15:
        return f"{value:.3g}"
    text = f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def count(number: float | None) -> str:
    """Return a count: exact below 10,000, then in thousands, millions, billions."""
    if number is None:
        return NONE
    if abs(number) < _EXACT_COUNT - 0.5:
        whole = float(number).is_integer() or abs(number) >= 1000
        return f"{number:,.0f}" if whole else decimal(number)
    return _in_units(number, _COUNTS)


def size(n_bytes: float) -> str:
    """Return bytes, in units of a thousand."""
    n_bytes = round(n_bytes) if math.isfinite(n_bytes) else n_bytes
    return "1 byte" if n_bytes == 1 else _in_units(n_bytes, _SIZES)


def duration(seconds: float) -> str:
    """Return a time, in the largest unit of which it is two or more."""
    return _in_units(seconds, _TIMES, least=2)


def fixed(value: float | None, places: int) -> str:
    """Return a number with so many decimals, none from a thousand on: for figures to compare."""
    if value is None:
        return NONE
    if not math.isfinite(value):
        return "unknown" if math.isnan(value) else str(value)
    if abs(value) < 1000:
        return f"{value:.{places}f}"
    return f"{value:,.0f}" if abs(value) < 1e6 else f"{value:.3g}"


def loss(value: float | None) -> str:
    """Return a loss in nats."""
    return fixed(value, 4)


def perplexity(loss: float | None) -> str:
    """Return the perplexity of a loss in nats."""
    return NONE if loss is None else fixed(math.exp(loss) if loss < 700 else math.inf, 2)


def scored(n_tokens: int | None, of: int | None) -> str:
    """Return ` (32,768 of 353,375 tokens)`; nothing for all that can be scored of a split."""
    if not n_tokens or not of or n_tokens >= of - 1:
        return ""
    return f" ({n_tokens:,} of {of:,} tokens)"


def plural(number: float, noun: str, nouns: str | None = None) -> str:
    """Return a number of things: `1 epoch`, `2.5 epochs`, `1,200 steps`."""
    text = f"{number:,}" if isinstance(number, int) else decimal(number)
    return f"{text} {noun if text == '1' else nouns or noun + 's'}"


def listed(words: Sequence[str], last: str) -> str:
    """Return words as in `a, b or c`, where `or` is what comes before the last."""
    *others, end = words
    return f"{', '.join(others)} {last} {end}" if others else end


def shares(parts: Mapping[str, float]) -> dict[str, str]:
    """Return what share of their sum each part is, largest first, below a thousandth left out."""
    total = sum(parts.values())
    ordered = sorted(parts.items(), key=lambda item: -item[1])
    return {name: f"{part / total:.1%}" for name, part in ordered if part > 0.001 * total}


def moment() -> str:
    """Return the time now in ISO 8601; in UTC where TZ is a zone that Python refuses."""
    now = datetime.datetime.now(datetime.UTC)
    with contextlib.suppress(ValueError, OverflowError):
        now = now.astimezone()
    return now.isoformat(timespec="seconds")


def _rounded(value: float) -> float:
    return float(f"{value:.2e}")


def _in_units(value: float, units: tuple[tuple[float, str], ...], least: float = 1) -> str:
    """Return a value in the largest unit of which there are at least `least`, once rounded."""
    factor, name = units[0]
    for unit in units:
        if math.isfinite(value) and abs(_rounded(value / unit[0])) >= least:
            factor, name = unit
    return decimal(value / factor) + name
