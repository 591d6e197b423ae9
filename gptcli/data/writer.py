"""Write one unit of text to its shards: encode, split, count.

Memory stays bounded: documents arrive in pieces, and text whose tail is held out is spooled to
disk until its length is known.
"""

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from gptcli import atomic
from gptcli.config.schema import DataConfig
from gptcli.data import shards
from gptcli.data.encode import Encoder, TextBatch
from gptcli.data.shard_writer import ShardWriter
from gptcli.data.shards import Counts, Split, UnitRecord
from gptcli.data.units import Unit, content_hash, documents, file_stats
from gptcli.data.worker import Encoded
from gptcli.errors import DataError
from gptcli.tokenizers import Tokenizer

OnProgress = Callable[[int], None]
"""Called with the bytes of text done since the last call."""

_BATCH_CHARS = 1 << 19
_BATCH_TEXTS = 4096
_SPOOL_BYTES = 1 << 26


def write_units(
    units: Iterable[Unit | None],
    folder: Path,
    tokenizer: Tokenizer,
    encoder: Encoder,
    data: DataConfig,
    *,
    seed: int,
    val_fraction: float,
    on_progress: OnProgress,
) -> Iterator[tuple[Unit, UnitRecord]]:
    """Tokenize units and write their shards into `folder`; yield each that is finished.

    While one is finished the next is already being encoded.

    Args:
        units: Units with local files; a None says that the next must be waited for.

    Raises:
        DataError: The text cannot be used, or its files changed meanwhile.
    """
    writer: _UnitWriter | None = None
    try:
        for batch, encoded in encoder.encode(_batches(units, data, tokenizer.safe_cut)):
            if writer is None:
                writer = _UnitWriter(batch.unit, folder, tokenizer, data, seed, val_fraction)
            writer.add(batch, encoded)
            on_progress(sum(encoded.n_bytes))
            if batch.ends_unit:
                record = writer.finish()
                writer = None
                yield batch.unit, record
    except BaseException as error:  # a caller that wants no more of them included
        if writer is not None:
            writer.drop(error)
        raise


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


class _UnitWriter:
    """Sends the tokens of a unit's documents to the shards of their split, and counts them.

    End-of-text stands before each document, as in llm.c's and FineWeb's shards.
    """

    def __init__(
        self,
        unit: Unit,
        folder: Path,
        tokenizer: Tokenizer,
        data: DataConfig,
        seed: int,
        val_fraction: float,
    ) -> None:
        self._unit, self._folder, self._tokenizer = unit, folder, tokenizer
        self._stamps = file_stats(unit)
        self._seed, self._val_fraction = seed, val_fraction
        dtype = shards.dtype_for(tokenizer.vocab_size)
        shape = (unit.index, dtype, data.shard_tokens)
        self._open = contextlib.ExitStack()
        self._sinks = {
            split: self._open.enter_context(ShardWriter(folder, split, *shape))
            for split in shards.SPLITS
        }
        self._tokens = dict.fromkeys(shards.SPLITS, 0)
        self._bytes = dict.fromkeys(shards.SPLITS, 0)
        self._pending: dict[Split, list[shards.Tokens]] = {split: [] for split in shards.SPLITS}
        self._n_pending = 0
        self._document = -1
        self._split: Split = "train"
        self._spool: tempfile.SpooledTemporaryFile[bytes] | None = None
        self._dtype = np.dtype(dtype)
        self._eot = np.array([tokenizer.eot], dtype=self._dtype)

    def add(self, batch: TextBatch, encoded: Encoded) -> None:
        """Add a batch of the unit's texts."""
        for index, (ids, n_bytes) in zip(batch.documents, encoded, strict=True):
            if index != self._document:
                if self._unit.held_out != "end":
                    self._divide()
                self._start_document(index)
            if self._spool is not None:
                with atomic.storage_errors(self._folder):
                    self._spool.write(ids.tobytes())
                self._bytes["train"] += n_bytes
            else:
                self._put(self._split, ids)
                self._bytes[self._split] += n_bytes

    def finish(self) -> UnitRecord:
        """Complete the shards and return what the unit became.

        Raises:
            DataError: Its files have changed meanwhile.
        """
        self._divide()
        self._flush()
        self._open.close()
        content = content_hash(self._unit)
        if file_stats(self._unit) != self._stamps:
            raise DataError(
                f"{self._unit.name}: changed while it was read", "run the command again"
            )
        return UnitRecord(
            name=self._unit.name,
            sha256=content,
            documents=self._document + 1,
            tokens=Counts(**self._tokens),
            bytes=Counts(**self._bytes),
            shards=[shard for sink in self._sinks.values() for shard in sink.shards],
        )

    def drop(self, error: BaseException) -> None:
        """Leave nothing of a unit that is not finished because of `error`."""
        if self._spool is not None:
            self._spool.close()
        self._open.__exit__(type(error), error, error.__traceback__)

    def _start_document(self, index: int) -> None:
        self._document = index
        self._split = self._unit.split_of(index, self._seed, self._val_fraction)
        if self._unit.held_out in ("tail", "end") and self._val_fraction > 0:
            # Where the tail begins is known only at the end.
            # The folder's disk must have room for the tokens anyway; that of /tmp may not.
            self._spool = self._spool or tempfile.SpooledTemporaryFile(
                _SPOOL_BYTES, dir=str(self._folder)
            )
            self._spool.write(self._eot.tobytes())
        else:
            self._put(self._split, self._eot)

    def _divide(self) -> None:
        """Divide what is kept aside, whose tail is held out."""
        if self._spool is None:
            return
        n_tokens = self._spool.tell() // self._dtype.itemsize
        n_train = int(n_tokens * (1 - self._val_fraction))
        lengths = self._tokenizer.token_lengths()
        self._spool.seek(0)
        done = 0
        while done < n_tokens:
            split: Split = "train" if done < n_train else "val"
            end = n_train if done < n_train else n_tokens
            raw = self._spool.read(self._dtype.itemsize * min(1 << 20, end - done))
            ids = np.frombuffer(raw, dtype=self._dtype)
            self._put(split, ids)
            if split == "val":
                n_bytes = int(lengths[ids].sum())
                self._bytes["val"] += n_bytes
                self._bytes["train"] -= n_bytes
            done += len(ids)
        self._spool.close()
        self._spool = None

    def _put(self, split: Split, ids: shards.Tokens) -> None:
        self._tokens[split] += len(ids)
        self._pending[split].append(ids)
        self._n_pending += len(ids)
        if self._n_pending > 1 << 20:
            self._flush()

    def _flush(self) -> None:
        """Hand what is pending to the shards."""
        for split, pending in self._pending.items():
            if pending:
                self._sinks[split].append(np.concatenate(pending))
                pending.clear()
        self._n_pending = 0
