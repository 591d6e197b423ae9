"""The time of a run, by what it was spent on; resumed parts are added up."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

Spent = dict[str, float]  # seconds of a run, by what they were spent on


class Clock:
    """Counts from now on, beginning with what was spent before."""

    def __init__(self, before: Spent) -> None:
        self._began = time.perf_counter() - sum(before.values())
        self._spent = dict(before)

    def add(self, work: str, seconds: float) -> None:
        """Count some of the time as spent on a kind of work."""
        self._spent[work] = self._spent.get(work, 0.0) + seconds

    @contextlib.contextmanager
    def during(self, work: str) -> Iterator[None]:
        """Count what the block takes."""
        began = time.perf_counter()
        yield
        self.add(work, time.perf_counter() - began)

    @property
    def seconds(self) -> float:
        """Wall time of the run so far."""
        return time.perf_counter() - self._began

    def spent(self) -> Spent:
        """Return where it went; what was not counted as any work is "other"."""
        known = {work: spent for work, spent in self._spent.items() if work != "other"}
        return {**known, "other": self.seconds - sum(known.values())}


def spent_before(status: Mapping[str, Any], step: int, seconds: float) -> Spent:
    """Return where the time of a run went before it was resumed at a step.

    Args:
        status: What status.json says, which may be older or newer than the checkpoint.
        step: Where the run resumes.
        seconds: What the checkpoint says of the time until then.
    """
    try:
        spent = TypeAdapter(Spent).validate_python(status.get("seconds_by_work"))
    except ValidationError:
        spent = {}
    total = sum(spent.values())
    if not 0 < total < math.inf or min(spent.values()) < 0:
        return {"other": seconds}
    if status.get("step") == step and total > seconds:  # a look after the checkpoint counts too
        return spent
    return {work: part / total * seconds for work, part in spent.items()}
