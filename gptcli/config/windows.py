"""The windows of a run: from which sources, how many to train on, and how many to score.

Plain arithmetic, for all who say so.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Self

from pydantic import Field, model_validator

from gptcli.config.model import MAX_VALUE, PathText, Section, invalid

MOST_EVAL_TOKENS = 1_000_000

Share = Annotated[float, Field(ge=0, le=1e6)]
Schedule = list[list[Annotated[float, Field(ge=0, le=MAX_VALUE)]]]
_MOST_SOURCES, _MOST_POINTS = 64, 64


class MixSource(Section):
    """One of the sources that `data.mix` draws from."""

    source: PathText
    """As data.source, or a folder that `gpt prepare` has written."""
    weight: Share | Schedule
    """Its share of the tokens drawn, relative to those of the others. A list of [fraction of the
    run, weight] changes it linearly from point to point."""
    max_epochs: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Most passes over its training windows, which limits the length of the run."""

    @property
    def points(self) -> list[tuple[float, float]]:
        """The fractions of the run at which its weight is given, and the weights."""
        if isinstance(self.weight, list):
            return [(fraction, weight) for fraction, weight in self.weight]
        return [(0.0, self.weight)]

    def weight_at(self, fraction: float) -> float:
        """Return its weight at a fraction of the run."""
        points = self.points
        before = [point for point in points if point[0] <= fraction][-1:] or points[:1]
        after = [point for point in points if point[0] > fraction][:1] or points[-1:]
        (start, low), (end, high) = before[0], after[0]
        part = (fraction - start) / (end - start) if start < fraction and start < end else 0.0
        return low + (high - low) * part

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not isinstance(self.weight, list):
            return self
        if not self.weight or any(len(point) != 2 for point in self.weight):
            raise invalid("data.mix", "a weight is a number or a list of [fraction, weight]")
        fractions = [point[0] for point in self.weight]
        if fractions != sorted(set(fractions)) or fractions[-1] > 1:
            raise invalid("data.mix", "the fractions of a weight rise from 0 to 1 at most")
        if len(fractions) > _MOST_POINTS:
            raise invalid("data.mix", f"a weight has at most {_MOST_POINTS} points")
        return self


def fractions_of(mix: Sequence[MixSource]) -> list[float]:
    """Return the fractions of the run between which all weights change linearly."""
    inner = {fraction for each in mix for fraction, _ in each.points}
    return sorted({0.0, 1.0, *inner})


def changes(mix: list[MixSource] | None) -> bool:
    """Tell whether the weights of a mixture change over the run."""
    return any(len(each.points) > 1 for each in mix or [])


def check_mix(mix: list[MixSource]) -> None:
    """Refuse, with a ValueError that names the key, a mixture that cannot be drawn."""
    if not 1 <= len(mix) <= _MOST_SOURCES:
        raise invalid("data.mix", f"expected 1 to {_MOST_SOURCES} sources, got {len(mix)}")
    names = [each.source for each in mix]
    for name in names:
        if names.count(name) > 1:
            raise invalid("data.mix", f"'{name}' is in it twice; add up its weights")
    for fraction in fractions_of(mix):
        if not any(each.weight_at(fraction) for each in mix):
            raise invalid("data.mix", f"all weights are 0 at {fraction:g} of the run")


def training_windows(n_tokens: int, seq_len: int, stride: int) -> int:
    """Return the windows of one epoch; the last stride - 1 tokens are left to its offset."""
    return max(1, (n_tokens - 1 - seq_len - (stride - 1)) // stride + 1)


def epochs(steps: int, windows_per_step: int, n_windows: int) -> float:
    """Return the passes over the training windows that so many steps make."""
    return steps * windows_per_step / n_windows


def scoring_windows(
    n_tokens: int, context: int, stride: int, most: int | None = None
) -> tuple[int, int]:
    """Return how many windows score about `most` tokens, and how many score all of them."""
    total = 1 + max(0, math.ceil((n_tokens - 1 - context) / stride))
    return min(total, max(1, most // stride)) if most else total, total


def eval_tokens(
    sizes: Sequence[tuple[int, int]], seq_len: int, most: int | None
) -> tuple[int, int]:
    """Return the training and validation tokens that an evaluation during a run scores.

    `sizes` are the tokens of both splits of each source, and `most` is `train.eval_tokens`.
    """
    most = share_of_eval(most, len(sizes))
    scored_train = sum(_scored(train, seq_len, min(most, val or most)) for train, val in sizes)
    return scored_train, sum(_scored(val, seq_len, most) for _, val in sizes if val)


def share_of_eval(most: int | None, n_sources: int) -> int:
    """Return the tokens that an evaluation scores of each source, if it has as many."""
    return max(1, (most or MOST_EVAL_TOKENS) // n_sources)


def _scored(n_tokens: int, seq_len: int, most: int) -> int:
    chosen, total = scoring_windows(n_tokens, seq_len, seq_len, most)
    return n_tokens - 1 if chosen == total else chosen * seq_len
