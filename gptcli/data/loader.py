"""Batches as a pure function of (seed, step): shuffled windows drawn without replacement.

With N tokens there are n windows of seq_len + 1 tokens, `stride` apart. Position p = step *
windows_per_step + slot belongs to epoch p // n and takes window permutation(epoch)[p % n], where
the permutation is a keyed Feistel network with cycle walking (Black and Rogaway 2002): random
access costs O(1), nothing is stored, and resuming is an addition. A thread reads ahead and copies
to the device.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Union

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gptcli.config.schema import Config, DataConfig
from gptcli.config.windows import training_windows
from gptcli.data.presets import data_dir, is_address
from gptcli.data.shards import MANIFEST, Manifest, TokenReader, read_manifest
from gptcli.errors import ConfigError, DataError
from gptcli.formatting import plural
from gptcli.model.loss import IGNORED
from gptcli.seeding import derive_seed
from gptcli.tokenizers import is_learned

if TYPE_CHECKING:  # of rows of conversations only runs on these import anything
    from gptcli.data.packing import PackedRows

Split = Union[TokenReader, "PackedRows"]
Indices = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.int64]
# What the model's forward pass takes: tokens (B, T) and targets (B, T), and of rows that hold
# several texts also where that of each token starts, (B, T); int64.
Batch = tuple[Tensor, ...]

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


class Loader(ABC):
    """The training windows of a split, by step; an epoch has `n_windows`."""

    n_tensors = 2  # of a batch

    def __init__(self, n_windows: int, *, windows_per_step: int, seed: int) -> None:
        self.n_windows = n_windows
        self.part_windows: tuple[int, ...] = (n_windows,)  # of an epoch of each source
        self._windows_per_step, self._seed = windows_per_step, seed
        self._block = -1, np.empty((2, 0), dtype=np.int64)

    @abstractmethod
    def read(self, windows: Numbers, epochs: Numbers) -> Batch:
        """Return windows of epochs, (B,) each, as tokens, targets and what else the model takes."""

    def epoch_of(self, step: int) -> int:
        """Return how many epochs are complete after `step` steps."""
        return step * self._windows_per_step // self.n_windows

    def windows(self, step: int) -> tuple[Numbers, Numbers]:
        """Return the windows of a step and the epoch of each, (windows_per_step,) each."""
        n = self._windows_per_step
        n_steps = max(1, _TOGETHER // n)
        block, place = divmod(step, n_steps)
        known, drawn = self._block
        if known != block:
            drawn = self.draw(block * n_steps * n, n_steps * n)
            self._block = block, drawn
        windows, in_epochs = drawn[:, place * n : (place + 1) * n]
        return windows, in_epochs

    def draw(self, first: int, n_positions: int) -> Numbers:
        """Return the windows of positions from `first` on and the epoch of each, (2, n)."""
        drawn = np.empty((2, n_positions), dtype=np.int64)
        slot = 0
        while slot < n_positions:
            epoch, index = divmod(first + slot, self.n_windows)
            count = min(n_positions - slot, self.n_windows - index)
            indices = np.arange(index, index + count, dtype=np.uint64)
            drawn[0, slot : slot + count] = permuted(
                indices, self.n_windows, "windows", self._seed, epoch
            )
            drawn[1, slot : slot + count] = epoch
            slot += count
        return drawn

    def micro_batches(
        self, step: int, size: int, turn: tuple[int, int] = (0, 1)
    ) -> Iterator[Batch]:
        """Yield the batches of a step, `size` rows at a time.

        With a turn (rank, world_size), only those of that rank: the ranks take turns.
        """
        windows, in_epochs = self.windows(step)
        for first in range(turn[0] * size, len(windows), turn[1] * size):
            rows = slice(first, first + size)
            yield self.read(windows[rows], in_epochs[rows])


class TokenLoader(Loader):
    """The windows of a split that is one sequence of tokens."""

    def __init__(
        self, tokens: TokenReader, *, seq_len: int, stride: int, windows_per_step: int, seed: int
    ) -> None:
        require_window(tokens, seq_len, "train")
        n_windows = training_windows(len(tokens), seq_len, stride)
        super().__init__(n_windows, windows_per_step=windows_per_step, seed=seed)
        self._tokens, self._seq_len, self._stride = tokens, seq_len, stride
        self._n_offsets = min(stride, len(tokens) - seq_len)  # a tiny split has no room for all

    def starts(self, windows: Numbers, in_epochs: Numbers) -> Numbers:
        """Return the first token of each window of an epoch, (B,) each."""
        offsets = {
            epoch: derive_seed("offset", self._seed, epoch) % self._n_offsets
            for epoch in set(in_epochs.tolist())
        }
        offset = np.array([offsets[epoch] for epoch in in_epochs.tolist()], dtype=np.int64)
        return windows * self._stride + offset

    def read(self, windows: Numbers, epochs: Numbers) -> Batch:
        """Return windows of epochs as tokens (B, T) and targets (B, T), int64."""
        return read_windows(self._tokens, self.starts(windows, epochs), self._seq_len)


def require_window(tokens: TokenReader, seq_len: int, split: str) -> None:
    """Refuse, with a DataError, a split that is shorter than one window."""
    if len(tokens) < seq_len + 1:
        longest = len(tokens) - 1
        raise DataError(
            f"the {split} split has {plural(len(tokens), 'token')}, but one window takes"
            f" seq_len + 1 = {seq_len + 1}",
            f"use more text, or -s data.seq_len={longest} or less" if longest > 0 else None,
        )


def read_windows(tokens: TokenReader, starts: Numbers, seq_len: int) -> Batch:
    """Return the windows at `starts` as tokens (B, T) and targets (B, T), int64."""
    rows = np.empty((len(starts), seq_len + 1), dtype=np.int64)
    for row, start in zip(rows, starts.tolist(), strict=True):
        row[:] = tokens.read(start, seq_len + 1)
    windows = torch.from_numpy(rows)
    # Whole tensors, not views of one: compiled code is made for the strides it first sees.
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


@dataclass(frozen=True)
class Part:
    """The prepared data of a run, or of one source of its mixture."""

    name: str  # of the source; empty if it is the only one
    folder: Path
    manifest: Manifest
    config: Config  # the run's, with this source alone

    @property
    def place(self) -> str:
        """What names the folder from elsewhere: its address, if it has one."""
        named = self.config.data.dir
        return str(named) if is_address(named) else str(self.folder)


def part_configs(config: Config) -> Iterator[Config]:
    """Yield the configuration of each source: `config` itself without a mixture.

    A vocabulary that is learned, or that spells the turns of conversations, is that of the first
    source. It is looked up when the second is asked for, so that the first may be prepared by then.

    Raises:
        ConfigError: Two sources have the same folder.
    """
    if config.data.mix is None:
        yield config
        return
    parts = list[DataConfig]()
    for source in config.data.mix:
        is_remote = is_address(source.source) and source.source.endswith("/")
        is_folder = is_remote or (Path(source.source) / MANIFEST).is_file()
        named = {"dir": source.source} if is_folder else {"source": source.source}
        parts.append(config.data.model_copy(update={"mix": None, **named}))
        _require_own_folder(parts)
    shared = None
    for data in parts:
        yield config.model_copy(update={"data": data, "tokenizer": shared or config.tokenizer})
        first = data_dir(data)
        if shared is None and (first / MANIFEST).is_file() and config.tokenizer.path is None:
            if is_learned(config.tokenizer) or read_manifest(first).is_chat:
                shared = type(config.tokenizer)(path=first.as_posix())
        shared = shared or config.tokenizer


def _require_own_folder(parts: Sequence[DataConfig]) -> None:
    """Refuse the last source if it has the folder of an earlier one."""
    *earlier, last = parts
    folder = data_dir(last)
    for each in earlier:
        if data_dir(each) == folder:
            name = last.source or each.source
            hint = f"prepare one elsewhere: `gpt prepare {name} --out DIR`, and name DIR"
            raise ConfigError(
                f"data.mix: two of the sources are prepared in {folder}",
                hint if name else "name each folder once, and add up the weights",
            )


def read_parts(config: Config) -> tuple[Part, ...]:
    """Read the manifests of all sources.

    Raises:
        ConfigError: Two sources have the same folder.
        DataError: A folder is not prepared, or has another tokenizer than the first.
    """
    found = list[Part]()
    for each in part_configs(config):
        folder = data_dir(each.data)
        found.append(Part(folder.name, folder, read_manifest(folder), each))
    if config.data.mix is None:
        return (replace(found[0], name=""),)
    names = [part.name for part in found]
    return tuple(
        replace(part, name=part.folder.as_posix()) if names.count(part.name) > 1 else part
        for part in found
    )


def combined(parts: Sequence[Part]) -> Manifest:
    """Return one manifest of all sources: their units, counts and content."""
    if len(parts) == 1:
        return parts[0].manifest
    recipe = parts[0].manifest.recipe
    forms = [part.manifest.recipe.conversation_format for part in parts]
    recipe = recipe.model_copy(update={
        "source": ", ".join(part.manifest.recipe.source for part in parts),
        "revision": None, "conversation_format": next(filter(None, forms), None),
    })  # fmt: skip
    return Manifest.of(recipe, [unit for part in parts for unit in part.manifest.units])


def open_parts(parts: Sequence[Part], config: Config) -> tuple[dict[str, Split], dict[str, Split]]:
    """Open both splits of all sources, by their names; a split without tokens is left out.

    Raises:
        DataError: A split cannot be read, or is shorter than one window.
    """
    train, val = dict[str, Split](), dict[str, Split]()
    for part in parts:
        try:
            train[part.name], held_out = _open_tokens(part.folder, part.manifest, config)
        except DataError as error:
            if part.name and not error.message.startswith(str(part.folder)):
                error.message = f"{part.folder}: {error.message}"
            raise
        if held_out is not None:
            val[part.name] = held_out
    return train, val


def _open_tokens(folder: Path, manifest: Manifest, config: Config) -> tuple[Split, Split | None]:
    if manifest.is_chat:
        from gptcli.data.packing import open_rows

        how = config.seq_len, config.seed
        rows = open_rows(folder, manifest, "train", *how)
        if rows is None:
            raise DataError(f"{folder}: no conversations to train on")
        return rows, open_rows(folder, manifest, "val", *how)
    train_tokens = TokenReader(folder, manifest, "train", config.data.cache_gb)
    require_window(train_tokens, config.seq_len, "train")
    val_tokens = TokenReader(folder, manifest, "val", config.data.cache_gb)
    if not len(val_tokens):
        return train_tokens, None
    require_window(val_tokens, config.seq_len, "val")
    return train_tokens, val_tokens


def make_loader(tokens: Sequence[Split], config: Config, max_steps: int) -> Loader:
    """Return the loader of a run's training splits, one of each source."""
    rows, seed = config.tokens_per_step // config.seq_len, config.seed
    loaders = [_make_loader(each, config, rows) for each in tokens]
    if config.data.mix is None:
        return loaders[0]
    from gptcli.data.mixture import MixtureLoader, Shares

    shares = Shares(config.data.mix, max_steps * rows, seed)
    return MixtureLoader(loaders, shares, windows_per_step=rows, seed=seed)


def _make_loader(tokens: Split, config: Config, rows: int) -> Loader:
    if isinstance(tokens, TokenReader):
        return TokenLoader(tokens, seq_len=config.seq_len, stride=config.stride,
                           windows_per_step=rows, seed=config.seed)  # fmt: skip
    from gptcli.data.packing import ConversationLoader

    return ConversationLoader(tokens, windows_per_step=rows, seed=config.seed)


class Prefetcher:
    """The loader's micro-batches in order; a step's are read while the one before is computed."""

    def __init__(
        self, loader: Loader, size: int, device: torch.device, turn: tuple[int, int] = (0, 1)
    ) -> None:
        self._loader, self._size, self._device, self._turn = loader, size, device, turn
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: tuple[int, Future[tuple[list[Batch], int]]] | None = None
        self.waited = 0.0  # seconds, for batches
        self.n_targets = 0  # that count, in the step that was read last

    def read_from(self, loader: Loader) -> None:
        """Read another loader's steps from here on; what was read ahead is dropped."""
        self._loader, self._ahead = loader, None

    def micro_batches(self, step: int) -> Iterator[Batch]:
        """Return the micro-batches of a step; those of the next step are read meanwhile."""
        began = time.perf_counter()
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = step, self._thread.submit(self._read, step)
        batches, self.n_targets = self._ahead[1].result()
        self._ahead = step + 1, self._thread.submit(self._read, step + 1)
        self.waited += time.perf_counter() - began
        # MPS may read a source that is gone by then: only pinned memory is kept until it is read.
        free = self._device.type == "cuda"
        return (
            tuple(part.to(self._device, non_blocking=free) for part in batch) for batch in batches
        )

    def _read(self, step: int) -> tuple[list[Batch], int]:
        batches = list(self._loader.micro_batches(step, self._size, self._turn))
        n_targets = sum(int((batch[1] != IGNORED).sum()) for batch in batches)
        if self._device.type == "cuda":  # only from pinned memory does a copy run meanwhile
            batches = [tuple(part.pin_memory() for part in batch) for batch in batches]
        return batches, n_targets

    def close(self) -> None:
        """End the thread; what it is reading is dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)
