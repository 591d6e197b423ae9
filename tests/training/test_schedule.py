"""The learning rate, step by step."""

import itertools
import math

import pytest

from gptcli.config import Config, load_config
from gptcli.training.optim import lr_at


def rates(schedule: str, steps: int = 100, warmup: int = 10) -> list[float]:
    """Return the learning rate of every step."""
    config: Config = load_config(
        None,
        ["optim.lr=1.0", "optim.min_lr=0.1", f"optim.schedule={schedule}",
         f"optim.warmup_steps={warmup}"],
    )  # fmt: skip
    return [lr_at(step, steps, config) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_rises_linearly_to_the_peak(schedule: str) -> None:
    assert rates(schedule)[:11] == pytest.approx([*(i / 10 for i in range(1, 11)), 1.0])


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_the_last_step_has_the_minimum(schedule: str) -> None:
    found = rates(schedule)
    assert found[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(found[10:]))


def test_cosine_is_halfway_in_the_middle() -> None:
    found = rates("cosine", steps=101, warmup=0)
    assert found[0] == 1.0 and found[50] == pytest.approx(0.55)
    assert found[25] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)


def test_wsd_holds_the_peak_and_falls_over_the_last_fifth() -> None:
    found = rates("wsd", steps=101, warmup=0)
    assert found[:80] == [1.0] * 80
    assert found[90] == pytest.approx(0.1 + 0.9 / 2)


def test_constant_stays() -> None:
    assert set(rates("constant")[10:]) == {1.0}


def test_the_minimum_is_a_tenth_unless_given() -> None:
    assert load_config(None, ["optim.lr=1e-3"]).min_lr == pytest.approx(1e-4)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_runs_shorter_than_the_warm_up_have_a_rate(steps: int) -> None:
    assert all(0 < rate <= 1 for rate in rates("cosine", steps=steps, warmup=5))
