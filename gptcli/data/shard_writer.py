"""Writes the shards of a unit: a file gets its name only once it is whole and on the disk."""

import contextlib
import hashlib
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import numpy as np

from gptcli import atomic
from gptcli.data.shards import HEADER_BYTES, MAGIC, Dtype, Shard, Split, Tokens
from gptcli.errors import DataError

_MOST_PARTS = 1000  # of a unit: three digits keep the order of the names that of the tokens


class ShardWriter:
    """Writes the tokens of one split of one unit, starting a new file when one is full.

    A context manager: the last file is complete when the block ends, and dropped when it raises.
    A file gets its name only once it is whole and on the disk.
    """

    def __init__(
        self, folder: Path, split: Split, unit: int, dtype: Dtype, shard_tokens: int
    ) -> None:
        self.shards: list[Shard] = []
        self._folder, self._split, self._unit = folder, split, unit
        self._dtype, self._shard_tokens = dtype, shard_tokens
        self._open = contextlib.ExitStack()
        self._file: BinaryIO | None = None
        self._n_tokens = 0

    def append(self, tokens: Tokens) -> None:
        """Write ids (n,) after those already written."""
        while len(tokens):
            file = self._file or self._start()
            part = tokens[: self._shard_tokens - self._n_tokens]
            with atomic.storage_errors(self._path):
                stored = np.dtype(self._dtype).newbyteorder("<")
                file.write(part.astype(stored, copy=False).data.cast("B"))
            self._n_tokens += len(part)
            tokens = tokens[len(part) :]
            if self._n_tokens == self._shard_tokens:
                self._finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            self._open.__exit__(kind, error, trace)
        elif self._file is not None:
            with self._open:  # drops the file if it cannot be finished
                self._finish()

    @property
    def _path(self) -> Path:
        name = f"{self._split}_{self._unit:06d}_{len(self.shards):03d}.bin"
        return self._folder / name

    def _start(self) -> BinaryIO:
        if len(self.shards) == _MOST_PARTS:
            raise DataError(
                f"{self._folder}: more than {_MOST_PARTS} shards for one file or group of files",
                f"choose a larger data.shard_tokens than {self._shard_tokens}",
            )
        self._file = self._open.enter_context(atomic.atomic_write(self._path))
        self._file.write(bytes(HEADER_BYTES))  # its place; the count is known at the end
        return self._file

    def _finish(self) -> None:
        assert self._file is not None
        header = np.zeros(256, dtype="<i4")
        header[:3] = *MAGIC[self._dtype], self._n_tokens
        self._file.seek(0)
        self._file.write(header.tobytes())
        self._open.close()
        with self._path.open("rb") as written:
            sha256 = hashlib.file_digest(written, "sha256").hexdigest()
        self.shards.append(
            Shard(file=self._path.name, split=self._split, tokens=self._n_tokens, sha256=sha256)
        )
        self._file, self._n_tokens = None, 0
