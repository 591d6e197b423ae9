"""Write one unit of text to its shards: encode, split, count.

Memory stays bounded: documents arrive in pieces, and text whose tail is held out is spooled to
disk until its length is known.
"""

import contextlib
import hashlib
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gptcli import atomic
from gptcli.config.schema import DataConfig, Split
from gptcli.data.encode import Encoded, Encoder, TextBatch
from gptcli.data.shards import HEADER_BYTES, MAGIC, SPLITS, Counts, Shard, UnitRecord
from gptcli.data.sources import PreparePlan
from gptcli.data.units import Unit, content_hash, documents, file_stats
from gptcli.errors import DataError
from gptcli.tokenizers import Dtype, Tokenizer, Tokens, dtype_for

OnProgress = Callable[[int], None]  # is called with the bytes of text done since the last call

_BATCH_CHARS = 1 << 19
_BATCH_TEXTS = 4096
_SPOOL_BYTES = 1 << 26
_WRITE_TOKENS = 1 << 20  # are collected before they are written
_MAX_PARTS = 1000  # of a unit: three digits keep the order of the names that of the tokens


def write_units(
    units: Iterable[Unit | None],
    plan: PreparePlan,
    tokenizer: Tokenizer,
    encoder: Encoder,
    on_progress: OnProgress,
) -> Iterator[tuple[Unit, UnitRecord]]:
    """Tokenize units and write their shards into the plan's folder; yield each that is finished.

    While one is finished the next is already being encoded. The units have local files; a None
    says that the next is still downloading.

    Raises:
        DataError: The text cannot be used, or its files changed meanwhile.
    """
    batches = encoder.encode(_batches(units, plan.data, tokenizer.safe_cut))
    for batch, encoded in batches:
        with _UnitWriter(batch.unit, plan, tokenizer) as writer:
            while True:
                writer.add(batch, encoded)
                on_progress(sum(encoded.n_bytes))
                if batch.ends_unit:
                    break
                batch, encoded = next(batches)
            record = writer.finish()
        yield batch.unit, record


def _batches(
    units: Iterable[Unit | None], data: DataConfig, cut: re.Pattern[str]
) -> Iterator[TextBatch | None]:
    """Read units and group their texts into batches, at least one for each unit."""
    for unit in units:
        if unit is None:
            yield None
            continue
        texts: list[str] = []
        indices: list[int] = []
        n_chars = 0
        for index, text in documents(unit, data, cut):
            texts.append(text)
            indices.append(index)
            n_chars += len(text)
            if n_chars >= _BATCH_CHARS or len(texts) == _BATCH_TEXTS:
                yield TextBatch(unit, texts, indices)
                texts, indices, n_chars = [], [], 0
        yield TextBatch(unit, texts, indices, ends_unit=True)


class _UnitWriter(contextlib.ExitStack):
    """Sends the tokens of a unit's documents to the shards of their split, and counts their bytes.

    End-of-text comes before each document, as in llm.c's and FineWeb's shards. Left by an error,
    it drops what is not finished.
    """

    def __init__(self, unit: Unit, plan: PreparePlan, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._unit, self._plan, self._tokenizer = unit, plan, tokenizer
        self._stats = file_stats(unit)
        self._dtype = dtype_for(tokenizer.vocab_size)
        shape = (unit.index, self._dtype, plan.data.shard_tokens)
        self._writers = {
            split: self.enter_context(ShardWriter(plan.folder, split, *shape)) for split in SPLITS
        }
        self._bytes = dict.fromkeys(SPLITS, 0)
        self._document = -1
        self._split: Split = "train"
        self._spool: tempfile.SpooledTemporaryFile[bytes] | None = None
        self._eot = np.array([tokenizer.eot], dtype=self._dtype)

    def add(self, batch: TextBatch, encoded: Encoded) -> None:
        """Add a batch of the unit's texts."""
        for index, (ids, n_bytes) in zip(batch.documents, encoded, strict=True):
            if index != self._document:
                self._start_document(index)
            self._append(ids)
            self._bytes[self._split] += n_bytes

    def finish(self) -> UnitRecord:
        """Complete the shards and return what the unit became; refuse files that have changed."""
        self._divide()
        self.close()
        content = content_hash(self._unit)
        if file_stats(self._unit) != self._stats:
            raise DataError(
                f"{self._unit.name}: changed while it was read", "run the command again"
            )
        shards = {split: writer.shards for split, writer in self._writers.items()}
        return UnitRecord(
            name=self._unit.name,
            sha256=content,
            documents=self._document + 1,
            tokens=Counts(**{split: sum(s.tokens for s in shards[split]) for split in SPLITS}),
            bytes=Counts(**self._bytes),
            shards=[*shards["train"], *shards["val"]],
        )

    def _start_document(self, index: int) -> None:
        unit, plan = self._unit, self._plan
        if unit.held_out != "end":
            self._divide()
        self._document = index
        self._split = unit.split_of(index, plan.seed, plan.val_fraction)
        if unit.held_out in ("tail", "end") and plan.val_fraction > 0 and self._spool is None:
            # Where the tail begins is known only at the end. The folder's disk must have room for
            # the tokens anyway; that of /tmp may not.
            self._spool = self.enter_context(
                tempfile.SpooledTemporaryFile(_SPOOL_BYTES, dir=str(plan.folder))
            )
        self._append(self._eot)

    def _append(self, ids: Tokens) -> None:
        if self._spool is None:
            self._writers[self._split].append(ids)
        else:
            with atomic.storage_errors(self._plan.folder):
                self._spool.write(ids.tobytes())

    def _divide(self) -> None:
        """Divide what is spooled, whose tail is held out."""
        if self._spool is None:
            return
        itemsize = self._eot.itemsize
        n_tokens = self._spool.tell() // itemsize
        n_train = int(n_tokens * (1 - self._plan.val_fraction))
        lengths = self._tokenizer.token_lengths()
        self._spool.seek(0)
        done = 0
        while done < n_tokens:
            split: Split = "train" if done < n_train else "val"
            end = n_train if done < n_train else n_tokens
            raw = self._spool.read(itemsize * min(1 << 20, end - done))
            ids = np.frombuffer(raw, dtype=self._dtype)
            self._writers[split].append(ids)
            if split == "val":
                n_bytes = int(lengths[ids].sum())
                self._bytes["val"] += n_bytes
                self._bytes["train"] -= n_bytes
            done += len(ids)
        self._spool.close()
        self._spool = None


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
        self._pending: list[Tokens] = []
        self._n_pending = self._n_tokens = 0
        self._open = contextlib.ExitStack()
        self._file: BinaryIO | None = None

    def append(self, tokens: Tokens) -> None:
        """Write ids (n,) after those already written."""
        self._pending.append(tokens)
        self._n_pending += len(tokens)
        if self._n_pending >= min(_WRITE_TOKENS, self._shard_tokens):
            self._flush()

    def _flush(self) -> None:
        if not self._n_pending:
            return
        stored = np.dtype(self._dtype).newbyteorder("<")
        tokens = np.concatenate(self._pending).astype(stored, copy=False)
        self._pending.clear()
        self._n_pending = 0
        while len(tokens):
            file = self._file or self._start()
            part = tokens[: self._shard_tokens - self._n_tokens]
            with atomic.storage_errors(self._path):
                file.write(part.data.cast("B"))
            self._n_tokens += len(part)
            tokens = tokens[len(part) :]
            if self._n_tokens == self._shard_tokens:
                self._finish()

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            with self._open:  # drops the file if it cannot be finished
                self._flush()
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
