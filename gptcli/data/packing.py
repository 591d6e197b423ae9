"""Rows that hold whole conversations: which share a row is a function of the seed and the epoch.

Rows are filled with the longest conversation that still fits (first-fit decreasing: Johnson 1974).
That depends on lengths alone, so it is done with the counts of each length: a few patterns of
lengths, each repeated many times, are all rows, however many conversations there are. An epoch has
the same number of rows as every other; which of the conversations of a length take its places, and
the order of the rows, differ. So any row of any epoch is found in the time of reading it, nothing
but a number for each conversation is kept, and resuming is an addition.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from gptcli.config.schema import Split
from gptcli.data.conversations import ConversationReader
from gptcli.data.loader import Batch, Loader, Numbers, permuted
from gptcli.data.shards import Manifest
from gptcli.errors import DataError
from gptcli.model.loss import IGNORED

Mask = npt.NDArray[np.bool_]
# Returns the tokens of a conversation (n,), and which are trained on (n,), by its number.
Read = Callable[[int], tuple[npt.NDArray[Any], Mask]]


class _Pattern(NamedTuple):
    """Rows with conversations of the same lengths: of each the length, and its first place."""

    n_rows: int
    lengths: Numbers
    places: Numbers  # among those of that length, for the first row
    strides: Numbers  # from one row to the next


def _patterns(counts: Sequence[int]) -> Iterator[_Pattern]:
    """Yield the patterns of rows of len(counts) - 1 tokens that hold counts[n] texts of n."""
    left, used = list(counts), [0] * len(counts)
    below = [max(0, n - 1) for n in range(len(counts))]  # the next that may be left

    def longest(most: int) -> int:
        n = most
        while n and not left[n]:
            n = below[n]
        while most > n:  # the way is shorter next time
            below[most], most = n, below[most]
        return n

    while longest(len(counts) - 1):
        row, room = dict[int, int](), len(counts) - 1
        n = longest(room)
        while n:
            row[n] = min(room // n, left[n])
            room -= n * row[n]
            n = longest(min(room, n - 1))
        n_rows = min(left[n] // times for n, times in row.items())
        each = [(n, used[n] + i, times) for n, times in row.items() for i in range(times)]
        yield _Pattern(n_rows, *np.array(each, dtype=np.int64).T)
        for n, times in row.items():
            left[n] -= n_rows * times
            used[n] += n_rows * times


class Packing:
    """Which conversations are in each row of an epoch, of `n_rows` rows."""

    def __init__(self, lengths: npt.NDArray[Any], most: int, seed: int) -> None:
        """Fill rows of `most` tokens with conversations of these lengths (n,); 0 is left out."""
        n = len(lengths)
        shuffled = np.arange(n, dtype=np.uint64)
        if n:
            shuffled = permuted(shuffled, n, "conversations", seed)
        self._members: Numbers = np.lexsort((shuffled, lengths))  # by length
        self._counts = np.bincount(lengths, minlength=most + 1)
        assert len(self._counts) == most + 1, "a conversation is longer than a row"
        self._firsts = np.cumsum(self._counts) - self._counts
        self._patterns = list(_patterns([0, *self._counts[1:].tolist()]))
        self._ends = np.cumsum([pattern.n_rows for pattern in self._patterns], dtype=np.int64)
        self.n_rows = int(self._ends[-1]) if self._patterns else 0
        self._seed = seed
        self._turn = -1, np.zeros(most + 1, dtype=np.int64)

    def row(self, index: int, epoch: int) -> Numbers:
        """Return the conversations of a row of an epoch, the longest first."""
        at = int(np.searchsorted(self._ends, index, side="right"))
        pattern = self._patterns[at]
        counts = self._counts[pattern.lengths]
        places = pattern.places + (index + pattern.n_rows - self._ends[at]) * pattern.strides
        turned = (places + self._turns(epoch)[pattern.lengths] % counts) % counts
        members: Numbers = self._members[self._firsts[pattern.lengths] + turned]
        return members

    def _turns(self, epoch: int) -> Numbers:
        """Return by how many places those of each length are turned in an epoch."""
        if self._turn[0] != epoch:
            lengths = np.arange(len(self._counts), dtype=np.uint64)
            turns = permuted(lengths, 1 << 62, "turns", self._seed, epoch)
            self._turn = epoch, turns.astype(np.int64)
        return self._turn[1]


class PackedRows(AbstractContextManager["PackedRows"]):
    """The rows of a split: conversations in places of seq_len + 1 tokens."""

    def __init__(
        self,
        lengths: npt.NDArray[Any],
        read: Read,
        seq_len: int,
        seed: int,
        close: Callable[[], None] = lambda: None,
    ) -> None:
        """Pack conversations of these lengths (n,); `close` closes the files that reading opens."""
        self._read, self.close = read, close
        self.seq_len = seq_len  # inputs of a row
        # The tokens of each conversation as far as rows hold them; 0 if it is left out.
        self.lengths = np.array(lengths, dtype=np.int64)
        self.n_cut = 0  # conversations that end early, after the last answer that a row holds
        self.n_left_out = 0  # those whose first answer is not over at the end of a row
        for number in np.flatnonzero(self.lengths > seq_len + 1).tolist():
            _, trained = read(number)
            ends = np.flatnonzero(trained[: seq_len + 1] & ~trained[1 : seq_len + 2]) + 1
            self.lengths[number] = kept = int(ends[-1]) if len(ends) else 0
            self.n_left_out += not kept
            self.n_cut += bool(kept and trained[kept:].any())
        self.close()  # until it is read
        self._packing = Packing(self.lengths, seq_len + 1, seed)
        self.n_rows = self._packing.n_rows  # of an epoch

    @property
    def description(self) -> str:
        """What the rows hold, for people."""
        padding = 1 - int(self.lengths.sum()) / max(1, self.n_rows * (self.seq_len + 1))
        parts = [f"{self.n_rows:,} rows, {padding:.1%} of them padding"]
        parts += [f"{self.n_cut:,} conversations cut after an answer"] * bool(self.n_cut)
        if self.n_left_out:
            parts.append(f"{self.n_left_out:,} left out: their first answer is too long")
        return ", ".join(parts)

    def read(
        self, rows: Sequence[int], epochs: Sequence[int] | None = None
    ) -> tuple[Batch, Numbers]:
        """Return rows of epochs, (B,) each, as a batch, and the conversation of each target (B, T).

        Without epochs they are of the first; no conversation is -1.
        """
        shape = len(rows), self.seq_len + 1
        tokens, targets = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORED, dtype=np.int64)
        starts, numbers = np.zeros(shape, dtype=np.int64), np.full(shape, -1, dtype=np.int64)
        for b, (row, epoch) in enumerate(zip(rows, epochs or [0] * len(rows), strict=True)):
            at = 0
            for number in self._packing.row(row, epoch).tolist():
                end = at + int(self.lengths[number])
                found, trained = (part[: end - at] for part in self._read(number))
                tokens[b, at:end] = found
                # The first is no target: nothing that it follows from is seen.
                targets[b, at + 1 : end] = np.where(trained[1:], tokens[b, at + 1 : end], IGNORED)
                starts[b, at:end], numbers[b, at:end] = at, number
                at = end
            starts[b, at:] = at  # what is left is a text that nothing is learned from
        parts = tokens[:, :-1], targets[:, 1:], starts[:, :-1]
        batch = tuple(torch.from_numpy(np.ascontiguousarray(part)) for part in parts)
        return batch, numbers[:, 1:]

    def __exit__(self, *error: object) -> None:
        self.close()


class ConversationLoader(Loader):
    """The rows of a split that is conversations, by step."""

    n_tensors = 3

    def __init__(self, rows: PackedRows, *, windows_per_step: int, seed: int) -> None:
        super().__init__(rows.n_rows, windows_per_step=windows_per_step, seed=seed)
        self._rows = rows

    def read(self, windows: Numbers, epochs: Numbers) -> Batch:
        """Return the rows of epochs: tokens, targets, and where each token's text starts."""
        return self._rows.read(windows.tolist(), epochs.tolist())[0]


def open_rows(
    folder: Path, manifest: Manifest, split: Split, seq_len: int, seed: int
) -> PackedRows | None:
    """Open a split of a folder of conversations; None if it is empty.

    Raises:
        DataError: It cannot be read, or no answer in it ends within a row.
    """
    reader = ConversationReader(folder, manifest, split)
    if not len(reader):
        return None
    rows = PackedRows(reader.lengths, reader.read, seq_len, seed, reader.close)
    if not rows.n_rows:
        raise DataError(
            f"{folder}: no {split} conversation fits in a row of {seq_len} tokens, not even up to"
            " its first answer",
            "raise data.seq_len, and model.block_size with it",
        )
    return rows
