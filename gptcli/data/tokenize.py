"""A unit of text to its shards: encode, divide into splits, count.

Memory stays bounded: documents come in pieces, and one whose tail is held out is kept aside on
the disk until its length is known.
"""

import contextlib
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from gptcli import durable
from gptcli.config.schema import DataConfig
from gptcli.data import shards
from gptcli.data.encode import Encoder
from gptcli.data.shards import Counts, ShardWriter, UnitRecord
from gptcli.data.units import Unit, documents, fingerprint
from gptcli.errors import DataError
from gptcli.tokenizers import Tokenizer, UnknownCharacters

OnProgress = Callable[[int], None]
"""Called with the bytes of text done since the last call."""

_BATCH_CHARS = 1 << 18
_BATCH_TEXTS = 4096
_SPOOL_BYTES = 1 << 26


def write_unit(
    unit: Unit,
    folder: Path,
    tokenizer: Tokenizer,
    encoder: Encoder,
    data: DataConfig,
    *,
    seed: int,
    val_fraction: float,
    on_progress: OnProgress,
) -> UnitRecord:
    """Tokenize the documents of a unit and write its shards into `folder`.

    End-of-text stands before each document, as in llm.c's and FineWeb's shards.

    Raises:
        DataError: The text cannot be used, or its files changed meanwhile.
    """
    before = fingerprint(unit)
    dtype = shards.dtype_for(tokenizer.vocab_size)
    shape = (unit.index, dtype, data.shard_tokens)
    documents_of: deque[list[int]] = deque()
    pieces = documents(unit, data, tokenizer.safe_cut)
    with (
        ShardWriter(folder, "train", *shape) as train,
        ShardWriter(folder, "val", *shape) as val,
        contextlib.closing(_UnitWriter({"train": train, "val": val}, tokenizer, folder)) as writer,
    ):
        current = -1
        try:
            for encoded in encoder.encode(_batches(pieces, documents_of)):
                for index, (ids, n_bytes) in zip(documents_of.popleft(), encoded, strict=True):
                    if index != current:
                        writer.end_document()
                        current = index
                        whole = unit.split_of(index, seed, val_fraction)
                        is_cut = unit.held_out == "tail" and val_fraction > 0
                        writer.start_document(whole, val_fraction if is_cut else None)
                    writer.add(ids, n_bytes)
                on_progress(sum(encoded.n_bytes))
        except UnknownCharacters as error:
            raise DataError(f"{unit.name}: {error.message}", error.hint) from error
        writer.end_document()
        writer.flush()
    if fingerprint(unit) != before:
        raise DataError(f"{unit.name}: changed while it was read", "run the command again")
    return UnitRecord(
        name=unit.name,
        sha256=before,
        documents=current + 1,
        tokens=Counts(**writer.tokens),
        bytes=Counts(**writer.bytes),
        shards=[*train.shards, *val.shards],
    )


def _batches(
    pieces: Iterator[tuple[int, str]], documents_of: deque[list[int]]
) -> Iterator[list[str]]:
    """Group pieces into batches for the encoder, noting each batch's document indices."""
    texts: list[str] = []
    indices: list[int] = []
    n_chars = 0
    for index, text in pieces:
        texts.append(text)
        indices.append(index)
        n_chars += len(text)
        if n_chars >= _BATCH_CHARS or len(texts) == _BATCH_TEXTS:
            documents_of.append(indices)
            yield texts
            texts, indices, n_chars = [], [], 0
    if texts:
        documents_of.append(indices)
        yield texts


class _UnitWriter:
    """Sends the tokens of documents to the shards of their split, and counts them."""

    def __init__(self, sinks: dict[str, ShardWriter], tokenizer: Tokenizer, folder: Path) -> None:
        self.tokens = {"train": 0, "val": 0}
        self.bytes = {"train": 0, "val": 0}
        self._sinks, self._tokenizer, self._folder = sinks, tokenizer, folder
        self._pending: dict[str, list[shards.Tokens]] = {"train": [], "val": []}
        self._n_pending = 0
        self._split = "train"
        self._cut: float | None = None
        self._spool: tempfile.SpooledTemporaryFile[bytes] | None = None
        self._eot = np.array([tokenizer.eot], dtype=np.uint32)

    def start_document(self, split: str, val_fraction: float | None) -> None:
        """Begin a document of one split, or one whose last `val_fraction` is validation."""
        self._split, self._cut = split, val_fraction
        if val_fraction is not None:
            # Where the tail begins is known only at the document's end.
            # The folder's disk must have room for the tokens anyway; that of /tmp may not.
            self._spool = tempfile.SpooledTemporaryFile(_SPOOL_BYTES, dir=str(self._folder))
            self._spool.write(self._eot.tobytes())
        else:
            self._put(split, self._eot)

    def add(self, ids: shards.Tokens, n_bytes: int) -> None:
        """Add ids that stand for `n_bytes` of text to the document."""
        if self._spool is not None:
            with durable.storage_errors(self._folder):
                self._spool.write(ids.astype(np.uint32).tobytes())
            self.bytes["train"] += n_bytes
        else:
            self._put(self._split, ids)
            self.bytes[self._split] += n_bytes

    def end_document(self) -> None:
        """Divide a spooled document; nothing to do for others."""
        if self._spool is None:
            return
        assert self._cut is not None
        n_tokens = self._spool.tell() // 4
        n_train = int(n_tokens * (1 - self._cut))
        lengths = self._tokenizer.token_lengths()
        self._spool.seek(0)
        done = 0
        while done < n_tokens:
            split, end = ("train", n_train) if done < n_train else ("val", n_tokens)
            ids = np.frombuffer(self._spool.read(4 * min(1 << 20, end - done)), dtype=np.uint32)
            self._put(split, ids)
            if split == "val":
                n_bytes = int(lengths[ids].sum())
                self.bytes["val"] += n_bytes
                self.bytes["train"] -= n_bytes
            done += len(ids)
        self._spool.close()
        self._spool = None

    def close(self) -> None:
        """Drop a document that has not ended."""
        if self._spool is not None:
            self._spool.close()

    def flush(self) -> None:
        """Hand what is pending to the shards."""
        for split, pending in self._pending.items():
            if pending:
                self._sinks[split].append(np.concatenate(pending))
                pending.clear()
        self._n_pending = 0

    def _put(self, split: str, ids: shards.Tokens) -> None:
        self.tokens[split] += len(ids)
        self._pending[split].append(ids)
        self._n_pending += len(ids)
        if self._n_pending > 1 << 20:
            self.flush()
