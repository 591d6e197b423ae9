"""Several sources in one run: which source, and which of its windows, each position draws.

The weights of the sources are whole numbers. Of the positions that are left to sources k and
beyond, source k takes each at which the running sum of its part of the weight passes a whole
number, as Bresenham's line does. So the count of its windows before any position is one division:
random access is O(1), exact in integers, and within a few windows of the weight. Weights that
change over the run do so in stairs; what is left of each division is carried from one to the next.

The windows of a source are drawn in the order of a run on that source alone.
"""

import bisect
import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch

from gptcli.config.schema import Config
from gptcli.config.windows import MixSource, fractions_of
from gptcli.data.loader import Batch, Loader, Numbers
from gptcli.seeding import derive_seed

_UNIT = 1 << 30  # about what the weights add up to
_MOST_STEPS = 10**9  # more than any run has
_STAIRS = 1024  # of a run whose weights change from its start to its end


class _Stair(NamedTuple):
    """A part of the run in which weights are constant."""

    start: int
    weights: list[int]
    wholes: list[int]  # the weights of each source and those after it together
    counts: list[int]  # windows of each source before it
    left: list[int]  # what is left of the division of each source but the last

    def divided(self, position: int) -> list[tuple[int, int]]:
        """Return the windows of each source from the start to a position, and what is left."""
        found, n = list[tuple[int, int]](), position - self.start
        for k, left in enumerate(self.left):
            found.append(divmod(n * self.weights[k] + left, self.wholes[k]))
            n -= found[-1][0]
        return [*found, (n, 0)]

    def sources(self, first: int, count: int) -> Numbers:
        """Return the sources of positions in the stair, (count,)."""
        sources = np.full(count, len(self.left), dtype=np.int64)
        ahead = np.arange(count + 1, dtype=np.int64)  # positions that are left to source k
        for k, (_, left) in enumerate(self.divided(first)[:-1]):
            taken = (ahead * self.weights[k] + left) // self.wholes[k]
            sources[np.diff(taken) > 0] = k
            ahead -= taken
        return sources


class Shares:
    """Which source each position of a run draws from."""

    def __init__(self, mix: Sequence[MixSource], n_positions: int, seed: int) -> None:
        """Lay out a run; its number of positions decides only where weights change."""
        wholes = [_UNIT] * len(mix)
        left = [derive_seed("mix", seed, k) % _UNIT for k in range(len(mix) - 1)]
        self._stairs = [_Stair(0, wholes, wholes, [0] * len(mix), left)]
        for fraction, weights in _changes(mix):
            self._change(round(fraction * n_positions), weights)

    def _change(self, start: int, weights: list[int]) -> None:
        """Let other weights hold from a position on."""
        before = self._stairs[-1]
        wholes = [max(1, whole) for whole in [*accumulate(reversed(weights))][::-1]]
        divided = before.divided(start)
        counts = [n + more for n, (more, _) in zip(before.counts, divided, strict=True)]
        left = [rest * wholes[k] // before.wholes[k] for k, (_, rest) in enumerate(divided[:-1])]
        if start == before.start:
            self._stairs.pop()
        self._stairs.append(_Stair(start, weights, wholes, counts, left))

    def draw(self, first: int, count: int) -> tuple[Numbers, list[int]]:
        """Return the sources of positions from `first` on, (count,), and the counts before it."""
        at = bisect.bisect_right(self._stairs, first, key=lambda stair: stair.start) - 1
        stair = self._stairs[at]
        counts = [n + more for n, (more, _) in zip(stair.counts, stair.divided(first), strict=True)]
        sources = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            stair = self._stairs[at]
            is_last = at + 1 == len(self._stairs)
            end = first + count if is_last else min(self._stairs[at + 1].start, first + count)
            n = end - first - done
            sources[done : done + n] = stair.sources(first + done, n)
            done, at = done + n, at + 1
        return sources, counts

    def counts(self, position: int) -> list[int]:
        """Return how many windows of each source are drawn before a position."""
        return self.draw(position, 0)[1]


def _changes(mix: Sequence[MixSource]) -> Iterator[tuple[float, list[int]]]:
    """Yield the fractions of a run from which on weights are constant, and the weights."""

    def weights_at(fraction: float) -> list[int]:
        weights = [each.weight_at(fraction) for each in mix]
        return [round(weight / sum(weights) * _UNIT) for weight in weights]

    for start, end in pairwise(fractions_of(mix)):
        is_even = weights_at(start) == weights_at(end)
        n_stairs = 1 if is_even else math.ceil(_STAIRS * (end - start))
        for i in range(n_stairs):
            middle = start + (end - start) * (i + 0.5) / n_stairs
            yield start + (end - start) * i / n_stairs, weights_at(middle)


class MixtureLoader(Loader):
    """The windows of several sources, by step; their numbers follow one another."""

    def __init__(
        self, parts: Sequence[Loader], shares: Shares, *, windows_per_step: int, seed: int
    ) -> None:
        self._ends = np.cumsum([part.n_windows for part in parts], dtype=np.int64)
        super().__init__(int(self._ends[-1]), windows_per_step=windows_per_step, seed=seed)
        self.part_windows = tuple(part.n_windows for part in parts)
        self._parts, self._shares = parts, shares

    def draw(self, first: int, n_positions: int) -> Numbers:
        """Return the windows of positions from `first` on and the epoch of each, (2, n)."""
        drawn = np.empty((2, n_positions), dtype=np.int64)
        sources, counts = self._shares.draw(first, n_positions)
        for k, part in enumerate(self._parts):
            places = np.flatnonzero(sources == k)
            drawn[:, places] = part.draw(counts[k], len(places))
            drawn[0, places] += self._ends[k] - part.n_windows
        return drawn

    def read(self, windows: Numbers, epochs: Numbers) -> Batch:
        """Return windows of epochs; rows of text beside conversations are one text each."""
        sources = np.searchsorted(self._ends, windows, side="right")
        found = list[tuple[torch.Tensor, Batch]]()
        for k in np.unique(sources).tolist():
            rows, part = np.flatnonzero(sources == k), self._parts[k]
            own = windows[rows] - (self._ends[k] - part.n_windows)
            found.append((torch.from_numpy(rows), part.read(own, epochs[rows])))
        n_parts = max(part.n_tensors for part in self._parts)
        shape = len(windows), found[0][1][0].shape[1]
        batch = tuple(torch.zeros(shape, dtype=torch.int64) for _ in range(n_parts))
        for places, tensors in found:
            for whole, tensor in zip(batch, tensors, strict=False):
                whole[places] = tensor
        return batch


def most_steps(config: Config, part_windows: Sequence[int]) -> int | None:
    """Return the steps within the `max_epochs` of all sources; None where none has any."""
    mix, per_step = config.data.mix or [], config.tokens_per_step // config.seq_len
    most = [(each.max_epochs or math.inf) * n for each, n in zip(mix, part_windows, strict=True)]

    def is_beyond(steps: int) -> bool:
        counts = Shares(mix, steps * per_step, config.seed).counts(steps * per_step)
        return any(count > limit for count, limit in zip(counts, most, strict=True))

    if min(most, default=math.inf) == math.inf:
        return None
    return bisect.bisect_left(range(1, _MOST_STEPS), True, key=is_beyond)
