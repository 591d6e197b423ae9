"""Batches as a pure function of (seed, step): shuffled windows drawn without replacement.

With N tokens there are n windows of seq_len + 1 tokens, `stride` apart. Position p = step *
windows_per_step + slot belongs to epoch p // n and takes window permutation(epoch)[p % n], where
the permutation is a keyed Feistel network with cycle walking (Black and Rogaway 2002): random
access costs O(1), nothing is stored, and resuming is an addition. A thread reads ahead and copies
to the device.
"""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gptcli.config.windows import epochs, training_windows
from gptcli.data.shards import TokenReader
from gptcli.errors import DataError
from gptcli.formatting import plural
from gptcli.seeding import derive_seed

Indices = npt.NDArray[np.uint64]
Batch = tuple[Tensor, Tensor]

_ROUNDS = 8
_TOGETHER = 4096  # positions permuted at a time: as many take little longer than a few


def permuted(indices: Indices, n: int, *key: int | str) -> Indices:
    """Map each index in [0, n) to its place in the permutation of [0, n) that `key` names."""
    half_bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    keys = np.array([derive_seed("round", i, *key) for i in range(_ROUNDS)], dtype=np.uint64)
    result = indices.copy()
    outside = np.ones(result.shape, dtype=bool)
    while outside.any():  # cycle walking: the network permutes [0, 4**k), which is at most 4 n
        result[outside] = _feistel(result[outside], half_bits, mask, keys)
        outside = result >= np.uint64(n)
    return result


def _feistel(values: Indices, half_bits: np.uint64, mask: np.uint64, keys: Indices) -> Indices:
    left, right = values >> half_bits, values & mask
    for key in keys:
        # The finalizer of splitmix64 (Steele, Lea and Flood 2014) as the round function.
        mixed = right + key
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
    return (left << half_bits) | right


class TokenLoader:
    """The training windows of a split, by step; an epoch has `n_windows`."""

    def __init__(
        self, tokens: TokenReader, *, seq_len: int, stride: int, windows_per_step: int, seed: int
    ) -> None:
        self._tokens, self._seq_len, self._stride = tokens, seq_len, stride
        self._windows_per_step, self._seed = windows_per_step, seed
        require_window(tokens, seq_len, "train")
        self._block = -1, np.empty(0, dtype=np.int64)
        self._n_offsets = min(stride, len(tokens) - seq_len)  # a tiny split has no room for all
        self.n_windows = training_windows(len(tokens), seq_len, stride)

    def epochs(self, steps: int) -> float:
        """Return the passes over all windows that `steps` steps make."""
        return epochs(steps, self._windows_per_step, self.n_windows)

    def epoch_of(self, step: int) -> int:
        """Return how many epochs are complete after `step` steps."""
        return step * self._windows_per_step // self.n_windows

    def starts(self, step: int) -> npt.NDArray[np.int64]:
        """Return the first token of each window of a step, (windows_per_step,)."""
        n = self._windows_per_step
        n_steps = max(1, _TOGETHER // n)
        block, place = divmod(step, n_steps)
        known, starts = self._block
        if known != block:
            starts = self._starts(block * n_steps * n, n_steps * n)
            self._block = block, starts
        return starts[place * n : (place + 1) * n]

    def _starts(self, first: int, n_positions: int) -> npt.NDArray[np.int64]:
        starts = np.empty(n_positions, dtype=np.int64)
        slot = 0
        while slot < n_positions:
            epoch, index = divmod(first + slot, self.n_windows)
            count = min(n_positions - slot, self.n_windows - index)
            indices = np.arange(index, index + count, dtype=np.uint64)
            windows = permuted(indices, self.n_windows, "windows", self._seed, epoch)
            offset = derive_seed("offset", self._seed, epoch) % self._n_offsets
            starts[slot : slot + count] = offset + windows.astype(np.int64) * self._stride
            slot += count
        return starts

    def micro_batches(
        self, step: int, size: int, turn: tuple[int, int] = (0, 1)
    ) -> Iterator[Batch]:
        """Yield the tokens (B, T) and targets (B, T) of a step, int64, `size` rows at a time.

        With a turn (rank, world_size), only those of that rank: the ranks take turns.
        """
        starts = self.starts(step)
        for first in range(turn[0] * size, len(starts), turn[1] * size):
            yield read_windows(self._tokens, starts[first : first + size], self._seq_len)


def require_window(tokens: TokenReader, seq_len: int, split: str) -> None:
    """Refuse, with a DataError, a split that is shorter than one window."""
    if len(tokens) < seq_len + 1:
        longest = len(tokens) - 1
        raise DataError(
            f"the {split} split has {plural(len(tokens), 'token')}, but one window takes"
            f" seq_len + 1 = {seq_len + 1}",
            f"use more text, or -s data.seq_len={longest} or less" if longest > 0 else None,
        )


def read_windows(tokens: TokenReader, starts: npt.NDArray[np.int64], seq_len: int) -> Batch:
    """Return the windows at `starts` as tokens (B, T) and targets (B, T), int64."""
    rows = np.empty((len(starts), seq_len + 1), dtype=np.int64)
    for row, start in zip(rows, starts.tolist(), strict=True):
        row[:] = tokens.read(start, seq_len + 1)
    windows = torch.from_numpy(rows)
    # Whole tensors, not views of one: compiled code is made for the strides it first sees.
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


class Prefetcher:
    """The loader's micro-batches in order; a step's are read while the one before is computed.

    Attributes:
        waited: Seconds spent waiting for a batch.
    """

    def __init__(
        self, loader: TokenLoader, size: int, device: torch.device, turn: tuple[int, int] = (0, 1)
    ) -> None:
        self._loader, self._size, self._device, self._turn = loader, size, device, turn
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: tuple[int, Future[list[Batch]]] | None = None
        self.waited = 0.0

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """Yield the micro-batches of a step while those of the next step are read."""
        began = time.perf_counter()
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = step, self._thread.submit(self._read, step)
        batches = self._ahead[1].result()
        self._ahead = step + 1, self._thread.submit(self._read, step + 1)
        self.waited += time.perf_counter() - began
        # MPS may read a source that is gone by then: only pinned memory is kept until it is read.
        free = self._device.type == "cuda"
        for tokens, targets in batches:
            yield (
                tokens.to(self._device, non_blocking=free),
                targets.to(self._device, non_blocking=free),
            )

    def _read(self, step: int) -> list[Batch]:
        batches = list(self._loader.micro_batches(step, self._size, self._turn))
        if self._device.type != "cuda":
            return batches
        # Only from pinned memory does a copy run beside the computation.
        return [(tokens.pin_memory(), targets.pin_memory()) for tokens, targets in batches]

    def close(self) -> None:
        """End the thread; what it is reading is dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)
