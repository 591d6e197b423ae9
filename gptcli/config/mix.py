"""A mixture of sources in the configuration: what is mixed, and in which shares over the run."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from gptcli.config.model import MAX_VALUE, PathText, Section, invalid

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


def fractions_of(mix: list[MixSource]) -> list[float]:
    """Return the fractions of the run between which all weights change linearly."""
    inner = {fraction for each in mix for fraction, _ in each.points}
    return sorted({0.0, 1.0, *inner})


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
