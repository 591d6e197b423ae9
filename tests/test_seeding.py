"""Keyed draws are the same forever: shuffles, splits and samples of old runs depend on them."""

import subprocess
import sys

import pytest

from gptcli.seeding import derive_seed, derive_uniform

GOLDEN = [
    ((), 2847183694713211083),
    ((0,), 2631537505891389924),
    ((1,), 1695107200560264221),
    (("a",), 3136151050186550259),
    (("split", 1337, 0, 0), 8401225227771465527),
    (("windows", 1337, 2**62), 8295610308739777119),
    (("\u00e9\n'\"", -1), 2646990174443056458),
]


@pytest.mark.parametrize(("key", "value"), GOLDEN)
def test_the_values_are_fixed_forever(key: tuple[int | str, ...], value: int) -> None:
    assert derive_seed(*key) == value
    assert derive_uniform(*key) == (value >> 10) / 2**53


def test_the_values_are_the_same_in_another_process() -> None:
    code = "from gptcli.seeding import derive_seed; print(derive_seed('split', 1337, 0, 0))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert int(done.stdout) == derive_seed("split", 1337, 0, 0)


def test_keys_are_kept_apart() -> None:
    keys: list[tuple[int | str, ...]] = [
        (), (1,), ("1",), (1, 1), (11,), ("1, 1",), (1, ""), ("", 1), ("a", "b"), ("ab",), ("ba",)
    ]  # fmt: skip
    assert len({derive_seed(*key) for key in keys}) == len(keys)


def test_half_a_surrogate_pair_may_stand_in_a_key() -> None:
    assert derive_seed("\ud800") != derive_seed("\ud801")


def test_draws_fill_their_range_evenly() -> None:
    ints = [derive_seed("n", i) for i in range(4000)]
    assert all(0 <= value < 2**63 for value in ints)
    assert max(ints) > 0.999 * 2**63
    floats = [derive_uniform("n", i) for i in range(4000)]
    assert all(0 <= value < 1 for value in floats)
    tenths = [sum(int(value * 10) == tenth for value in floats) for tenth in range(10)]
    assert all(320 < count < 480 for count in tenths)
