"""Write the tokens of a unit to the files of a split; a file gets its name once it is complete."""

import contextlib
import hashlib
from array import array
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gptcli import atomic
from gptcli.config.schema import Split
from gptcli.data.conversations import Lengths
from gptcli.data.shards import HEADER_BYTES, MAGIC, MASK, STARTS, Shard
from gptcli.errors import DataError
from gptcli.tokenizers import Dtype, Tokens
from gptcli.tokenizers.chat import Mask

_MAX_PARTS = 1000  # of a unit: three digits keep the order of the names that of the tokens


class ShardWriter(contextlib.AbstractContextManager["ShardWriter"]):
    """Writes the tokens of one split of one unit, starting a new file when one is full.

    A context manager: the last file is complete when the block ends, and dropped when it raises.
    A file gets its name only once it is complete and on the disk.
    """

    def __init__(
        self, folder: Path, split: Split, unit: int, dtype: Dtype, shard_tokens: int
    ) -> None:
        self.shards: list[Shard] = []
        self._folder, self._split, self._unit = folder, split, unit
        self._dtype, self._shard_tokens = dtype, shard_tokens
        self._n_tokens = 0
        self._open = contextlib.ExitStack()
        self._file: BinaryIO | None = None

    def append(self, tokens: Tokens) -> None:
        """Write ids (n,) after those already written."""
        while len(tokens):
            part = tokens[: self._shard_tokens - self._n_tokens]
            self._write(part)
            tokens = tokens[len(part) :]
            if self._n_tokens == self._shard_tokens:
                self._finish()

    def _write(self, tokens: Tokens) -> None:
        """Write ids to the open file, or to a new one."""
        file = self._file or self._start()
        stored = np.dtype(self._dtype).newbyteorder("<")
        with atomic.storage_errors(self._path):
            file.write(tokens.astype(stored, copy=False).data.cast("B"))
        self._n_tokens += len(tokens)

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            with self._open:  # drops the file if it cannot be finished
                if self._file is not None:
                    self._finish()
        self._open.__exit__(*error)

    @property
    def _path(self) -> Path:
        name = f"{self._split}_{self._unit:06d}_{len(self.shards):03d}.bin"
        return self._folder / name

    def _start(self) -> BinaryIO:
        if len(self.shards) == _MAX_PARTS:
            raise DataError(
                f"{self._folder}: more than {_MAX_PARTS} shards for one file or group of files",
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


class ConversationShardWriter(ShardWriter):
    """Writes conversations, and beside each file its mask and where they begin.

    None is cut: one that is longer than a file may be gets a file by itself.
    """

    def _start(self) -> BinaryIO:
        self._mask, self._starts = bytearray(), array("Q")
        self._bits = np.empty(0, np.bool_)  # of the mask, not yet a byte
        self._n_trained = 0
        return super()._start()

    def append_conversations(self, tokens: Tokens, trained: Mask, lengths: Lengths) -> None:
        """Write conversations after those already written; `lengths` are the tokens of each."""
        ends = np.cumsum(lengths)
        start = first = 0
        while first < len(lengths):
            room = self._shard_tokens - self._n_tokens
            last = int(np.searchsorted(ends, start + room, side="right"))
            if last <= first and self._n_tokens:
                self._finish()
                continue
            last = max(last, first + 1)
            end = int(ends[last - 1])
            begins = self._n_tokens + ends[first:last] - lengths[first:last] - start
            self._write(tokens[start:end])
            self._starts.extend(begins.tolist())
            bits = np.concatenate([self._bits, trained[start:end]])
            whole = len(bits) // 8 * 8
            self._mask += np.packbits(bits[:whole], bitorder="little").tobytes()
            self._bits = bits[whole:]
            self._n_trained += int(np.count_nonzero(trained[start:end]))
            start, first = end, last

    def _finish(self) -> None:
        starts = np.array(self._starts, dtype="<u8")
        # The last byte is filled with zeros.
        mask = bytes(self._mask) + np.packbits(self._bits, bitorder="little").tobytes()
        sides = {MASK: mask, STARTS: starts.tobytes()}
        for suffix, content in sides.items():
            atomic.write_bytes(self._path.with_suffix(suffix), content)
        super()._finish()
        about = {
            "conversations": len(starts),
            "trained": self._n_trained,
            "mask_sha256": hashlib.sha256(mask).hexdigest(),
            "starts_sha256": hashlib.sha256(sides[STARTS]).hexdigest(),
        }
        self.shards[-1] = self.shards[-1].model_copy(update=about)
