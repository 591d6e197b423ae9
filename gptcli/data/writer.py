"""Write one unit of text to its shards: encode, split, count.

Memory stays bounded: documents arrive in pieces, and text whose tail is held out is spooled to
disk until its length is known.
"""

import contextlib
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from typing import BinaryIO

import numpy as np

from gptcli import atomic
from gptcli.config.schema import DataConfig, Split
from gptcli.data.conversations import Lengths
from gptcli.data.dedup import REPEATED, KeyFile, keys_of, repeated, store, stored
from gptcli.data.encode import Encoded, Encoder, TextBatch
from gptcli.data.hub import OnBytes
from gptcli.data.journal import Journal
from gptcli.data.shard_writer import ConversationShardWriter, ShardWriter
from gptcli.data.shards import SPLITS, Counts, Shard, Skipped, UnitRecord
from gptcli.data.sources import PreparePlan
from gptcli.data.units import Unit, content_hash, documents, file_stats
from gptcli.errors import DataError
from gptcli.tokenizers import Tokenizer, Tokens, dtype_for
from gptcli.tokenizers.chat import Layout

_BATCH_CHARS = 1 << 19
_BATCH_TEXTS = 4096
_SPOOL_BYTES = 1 << 26
_ENDLESS = 1 << 62


def write_units(
    units: Iterable[Unit | None],
    plan: PreparePlan,
    tokenizer: Tokenizer,
    encoder: Encoder,
    on_bytes: OnBytes,
) -> Iterator[tuple[Unit, UnitRecord]]:
    """Tokenize units and write their shards into the plan's folder; yield each that is finished.

    While one is finished the next is already being encoded. The units have local files; a None
    says that the next is still downloading.

    Raises:
        DataError: The text cannot be used, or its files changed meanwhile.
    """
    make = _StoredUnitWriter if plan.data.dedup else _writer_of(plan)
    batches = encoder.encode(_batches(units, plan.data, tokenizer.safe_cut))
    for batch, encoded in batches:
        with make(batch.unit, plan, tokenizer) as writer:
            while True:
                writer.add(batch, encoded)
                on_bytes(sum(encoded.n_bytes))
                if batch.ends_unit:
                    break
                batch, encoded = next(batches)
            record = writer.finish()
        yield batch.unit, record


def write_without_repeats(
    plan: PreparePlan, tokenizer: Tokenizer, journal: Journal, records: list[UnitRecord]
) -> list[UnitRecord]:
    """Write the shards of units whose tokens are stored, without documents that repeat another.

    The earliest document stays, where the source's own validation text comes before all else.
    The journal has the tokens, and gets the records of the finished units for those of the stored.
    """
    assert plan.data.dedup is not None
    order = sorted(plan.source.units, key=lambda unit: unit.held_out != "val")
    files = [journal.file(unit.index, ".keys") for unit in order]
    marks = repeated(files, [records[unit.index].documents for unit in order])
    done: dict[int, UnitRecord] = {}
    for unit, is_repeated in zip(order, marks, strict=True):
        record, file = journal.record(unit.index), journal.file(unit.index, ".tokens")
        if record is None:
            before, reason = records[unit.index], REPEATED[plan.data.dedup]
            with _writer_of(plan)(unit, plan, tokenizer) as writer, file.open("rb") as tokens:
                writer.skipped.update(before.skipped or {})
                dtype = dtype_for(tokenizer.vocab_size)
                for batch, encoded in stored(tokens, unit, dtype, is_repeated, reason):
                    writer.add(batch, encoded)
                record = writer.finish(before.sha256)
            journal.commit(unit.index, record)
        file.unlink(missing_ok=True)
        done[unit.index] = record
    return [done[unit.index] for unit in plan.source.units]


def _writer_of(plan: PreparePlan) -> "type[_UnitWriter]":
    return _ConversationUnitWriter if plan.data.format else _TextUnitWriter


def _batches(
    units: Iterable[Unit | None], data: DataConfig, cut: re.Pattern[str]
) -> Iterator[TextBatch | None]:
    """Read units and group their texts into batches, at least one for each unit.

    A conversation is in one batch.
    """
    for unit in units:
        if unit is None:
            yield None
            continue
        skipped: list[tuple[str, str]] = []
        batch, n_chars = TextBatch(unit, [], []), 0
        for index, text, role in documents(unit, data, cut, skipped):
            is_full = n_chars >= _BATCH_CHARS or len(batch.texts) >= _BATCH_TEXTS
            if is_full and (role < 0 or index != batch.documents[-1]):
                yield replace(batch, skipped=skipped.copy())
                skipped.clear()
                batch, n_chars = TextBatch(unit, [], []), 0
            batch.texts.append(text)
            batch.documents.append(index)
            batch.roles.append(role)
            n_chars += len(text)
        yield replace(batch, ends_unit=True, skipped=skipped)


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
        make = ConversationShardWriter if plan.data.format else ShardWriter
        self._writers = {
            split: self.enter_context(make(plan.folder, split, *shape)) for split in SPLITS
        }
        self._bytes = dict.fromkeys(SPLITS, 0)
        self._n_documents = 0
        self.skipped: dict[str, Skipped] = {}
        # Where a tail begins is known only at the end: until then, what is added is stored. The
        # folder's disk must have room for the tokens anyway; that of /tmp may not.
        self._store: BinaryIO | None = None
        self._counts: dict[int, int] = {}  # tokens of each document that is stored
        if unit.held_out in ("tail", "end") and plan.val_fraction > 0:
            make_file = tempfile.SpooledTemporaryFile[bytes]
            self._store = self.enter_context(make_file(_SPOOL_BYTES, dir=str(plan.folder)))  # type: ignore[assignment]

    def add(self, batch: TextBatch, encoded: Encoded) -> None:
        """Add a batch of the unit's texts."""
        for reason, place in batch.skipped:
            before = self.skipped.get(reason, Skipped(rows=0, first=place))
            self.skipped[reason] = before.model_copy(update={"rows": before.rows + 1})
        if self._store is None:
            self._write(batch, encoded)
            return
        with atomic.storage_errors(self._plan.folder):
            store(self._store, batch, encoded)
        for document, n_tokens in zip(batch.documents, encoded.counts, strict=True):
            self._counts[document] = self._counts.get(document, 0) + n_tokens

    def _write(self, batch: TextBatch, encoded: Encoded) -> None:
        """Write a batch to the shards; what is stored for later never gets here."""
        raise NotImplementedError

    def _end(self) -> None:
        """Write what was stored until its end was known."""
        if self._store is not None:
            self._store.seek(0)
            for batch, encoded in stored(self._store, self._unit, self._dtype):
                self._write(batch, encoded)

    def finish(self, content: str | None = None) -> UnitRecord:
        """Complete the shards and return what the unit became; refuse files that have changed.

        Args:
            content: The hash of the unit's files, if they were read before.
        """
        self._end()
        self.close()
        if content is None:
            content = content_hash(self._unit)
            if file_stats(self._unit) != self._stats:
                raise DataError(
                    f"{self._unit.name}: changed while it was read", "run the command again"
                )
        data = self._plan.data
        shards = {split: writer.shards for split, writer in self._writers.items()}
        return UnitRecord(
            name=self._unit.name,
            sha256=content,
            documents=self._n_documents,
            tokens=Counts(**{split: sum(s.tokens for s in shards[split]) for split in SPLITS}),
            bytes=Counts(**self._bytes),
            shards=[*shards["train"], *shards["val"]],
            skipped=self.skipped if data.format or data.filters or data.dedup else None,
        )


class _TextUnitWriter(_UnitWriter):
    """Sends documents to the shards of their split; a tail, after its place in the tokens."""

    _document = -1
    _n_train = 0  # tokens to come before those for validation

    def _write(self, batch: TextBatch, encoded: Encoded) -> None:
        self._parts: dict[Split, list[Tokens]] = {split: [] for split in SPLITS}
        for index, (ids, n_bytes) in zip(batch.documents, encoded, strict=True):
            if index != self._document:
                self._start_document(index)
            self._append(ids, n_bytes)
        for split, parts in self._parts.items():
            self._writers[split].append(np.concatenate(parts or [encoded.ids[:0]]))

    def _start_document(self, index: int) -> None:
        unit, plan = self._unit, self._plan
        if self._store is None:
            is_val = unit.split_of(index, plan.seed, plan.val_fraction) == "val"
            self._n_train = 0 if is_val else _ENDLESS
        elif unit.held_out == "tail" or not self._n_documents:
            counts = self._counts.values() if unit.held_out == "end" else [self._counts[index]]
            self._n_train = int(sum(n + 1 for n in counts) * (1 - plan.val_fraction))
        self._document = index
        self._n_documents += 1
        self._append(np.array([self._tokenizer.eot], dtype=self._dtype), 0)

    def _append(self, ids: Tokens, n_bytes: int) -> None:
        if n := min(self._n_train, len(ids)):
            self._parts["train"].append(ids[:n])
            self._n_train -= n
        n_val = 0
        if n < len(ids):
            self._parts["val"].append(ids[n:])
            n_val = int(self._lengths[ids[n:]].sum()) if n else n_bytes
        self._bytes["val"] += n_val
        self._bytes["train"] += n_bytes - n_val

    @cached_property
    def _lengths(self) -> Lengths:
        return self._tokenizer.token_lengths()


class _ConversationUnitWriter(_UnitWriter):
    """Sends the conversations of a unit to the shards of their split, whole."""

    def _write(self, batch: TextBatch, encoded: Encoded) -> None:
        if not batch.texts:
            return
        layout, fraction = Layout(self._tokenizer), self._plan.val_fraction
        tokens, trained, places = layout.join(encoded.ids, encoded.counts, batch.roles)
        firsts = np.flatnonzero(np.diff(batch.documents, prepend=-1))
        first, n = self._n_documents, len(self._counts)
        self._n_documents += len(firsts)
        lengths = np.diff(places[firsts], append=len(tokens))
        n_bytes = np.add.reduceat(np.asarray(encoded.n_bytes, np.int64), firsts)
        if self._store is not None:  # of few, the last, at least one where there are two
            is_val = np.arange(first, self._n_documents) >= n - max(n > 1, round(n * fraction))
        else:
            draw = partial(self._unit.split_of, seed=self._plan.seed, val_fraction=fraction)
            is_val = np.array([draw(batch.documents[at]) == "val" for at in firsts])
        for split, chosen in zip(SPLITS, (~is_val, is_val), strict=True):
            of_split, writer = np.repeat(chosen, lengths), self._writers[split]
            assert isinstance(writer, ConversationShardWriter)
            writer.append_conversations(tokens[of_split], trained[of_split], lengths[chosen])
            self._bytes[split] += int(n_bytes[chosen].sum())


class _StoredUnitWriter(_UnitWriter):
    """Stores what a unit's batches became, and their documents' keys, until all units are there."""

    def __init__(self, unit: Unit, plan: PreparePlan, tokenizer: Tokenizer) -> None:
        super().__init__(unit, plan, tokenizer)
        assert plan.data.dedup is not None
        journal = Journal(plan.folder)
        self._paths = [journal.file(unit.index, suffix) for suffix in (".tokens", ".keys")]
        self._store, keys = (self.enter_context(atomic.atomic_write(path)) for path in self._paths)
        self._key_file = KeyFile(keys)
        self._keys = keys_of(plan.data.dedup, self._key_file.append)
        self._n_tokens = 0

    def add(self, batch: TextBatch, encoded: Encoded) -> None:
        """Add a batch of the unit's texts."""
        super().add(batch, encoded)
        with atomic.storage_errors(self._plan.folder):
            self._keys.add(batch)
        self._n_documents = max(self._n_documents, 1 + max(batch.documents, default=-1))
        self._n_tokens += len(encoded.ids)
        self._bytes["train"] += sum(encoded.n_bytes)

    def _end(self) -> None:
        with atomic.storage_errors(self._plan.folder):
            self._keys.finish()
            self._key_file.flush()

    def finish(self, content: str | None = None) -> UnitRecord:
        """Complete the files; in place of shards, the record names them and their sizes."""
        record = super().finish(content)
        files = [
            Shard(file=path.name, split="train", tokens=path.stat().st_size, sha256="")
            for path in self._paths
        ]
        return record.model_copy(update={"tokens": Counts(train=self._n_tokens), "shards": files})
