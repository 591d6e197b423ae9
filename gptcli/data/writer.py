"""Write one unit of text to its shards: encode, split, count.

Memory stays bounded: documents arrive in pieces, and text whose tail is held out is spooled to
disk until its length is known.
"""

import contextlib
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import numpy as np

from gptcli import atomic
from gptcli.config.schema import DataConfig, Split
from gptcli.data.conversations import Lengths
from gptcli.data.dedup import REPEATED, KeyFile, keys_of, repeated, store, stored
from gptcli.data.encode import Encoded, Encoder, TextBatch
from gptcli.data.journal import Journal
from gptcli.data.messages import BadRow
from gptcli.data.shard_writer import ConversationShardWriter, ShardWriter
from gptcli.data.shards import SPLITS, Counts, Shard, Skipped, UnitRecord
from gptcli.data.sources import PreparePlan
from gptcli.data.units import Unit, content_hash, conversations, documents, file_stats
from gptcli.errors import DataError
from gptcli.tokenizers import Tokenizer, Tokens, dtype_for
from gptcli.tokenizers.chat import ROLES, Layout, Mask

OnProgress = Callable[[int], None]  # is called with the bytes of text done since the last call

_BATCH_CHARS = 1 << 19
_BATCH_TEXTS = 4096
_SPOOL_BYTES = 1 << 26


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
    make = _StoredUnitWriter if plan.data.dedup else _writer_of(plan)
    batches = encoder.encode(_batches(units, plan.data, tokenizer.safe_cut))
    for batch, encoded in batches:
        with make(batch.unit, plan, tokenizer) as writer:
            while True:
                writer.add(batch, encoded)
                on_progress(sum(encoded.n_bytes))
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

    Args:
        plan: What is prepared.
        tokenizer: Its tokenizer.
        journal: Where the tokens are stored, and the records of finished units go.
        records: Those of the stored units.
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
            with _writer_of(plan)(unit, plan, tokenizer) as writer:
                writer.skipped.update(before.skipped or {})
                dtype = dtype_for(tokenizer.vocab_size)
                for batch, encoded in stored(file, unit, dtype, is_repeated, reason):
                    writer.add(batch, encoded)
                record = writer.finish(before.sha256)
            journal.commit(unit.index, record)
        file.unlink(missing_ok=True)
        done[unit.index] = record
    return [done[unit.index] for unit in plan.source.units]


def _writer_of(plan: PreparePlan) -> "type[_UnitWriter]":
    return _ConversationUnitWriter if plan.data.format else _UnitWriter


def _batches(
    units: Iterable[Unit | None], data: DataConfig, cut: re.Pattern[str]
) -> Iterator[TextBatch | None]:
    """Read units and group their texts into batches, at least one for each unit."""
    for unit in units:
        if unit is None:
            yield None
            continue
        if data.format:
            yield from _conversation_batches(unit, data)
            continue
        texts: list[str] = []
        indices: list[int] = []
        skipped: list[tuple[str, str]] = []
        n_chars = 0
        for index, text in documents(unit, data, cut, skipped):
            texts.append(text)
            indices.append(index)
            n_chars += len(text)
            if n_chars >= _BATCH_CHARS or len(texts) == _BATCH_TEXTS:
                yield TextBatch(unit, texts, indices, skipped=skipped.copy())
                texts, indices, n_chars = [], [], 0
                skipped.clear()
        yield TextBatch(unit, texts, indices, ends_unit=True, skipped=skipped)


def _conversation_batches(unit: Unit, data: DataConfig) -> Iterator[TextBatch]:
    """Group a unit's conversations into batches, whole ones only, at least one batch."""
    batch, n_chars, index = TextBatch(unit, [], []), 0, 0
    for place, found in conversations(unit, data):
        if isinstance(found, BadRow):
            batch.skipped.append((found.reason, place))
            continue
        texts = [content for _, content in found]
        batch.texts.extend(texts)
        batch.roles.extend([ROLES.index(role) for role, _ in found])
        batch.documents.extend([index] * len(found))
        n_chars += sum(map(len, texts))
        index += 1
        if n_chars >= _BATCH_CHARS or len(batch.texts) >= _BATCH_TEXTS:
            yield batch
            batch, n_chars = TextBatch(unit, [], []), 0
    yield replace(batch, ends_unit=True)


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
        self._document, self._n_documents = -1, 0
        self.skipped: dict[str, Skipped] = {}
        self._split: Split = "train"
        self._spool: tempfile.SpooledTemporaryFile[bytes] | None = None
        self._eot = np.array([tokenizer.eot], dtype=self._dtype)

    def add(self, batch: TextBatch, encoded: Encoded) -> None:
        """Add a batch of the unit's texts."""
        self._count_skipped(batch)
        for index, (ids, n_bytes) in zip(batch.documents, encoded, strict=True):
            if index != self._document:
                self._start_document(index)
            self._append(ids)
            self._bytes[self._split] += n_bytes

    def _count_skipped(self, batch: TextBatch) -> None:
        for reason, place in batch.skipped:
            before = self.skipped.get(reason, Skipped(rows=0, first=place))
            self.skipped[reason] = before.model_copy(update={"rows": before.rows + 1})

    def finish(self, content: str | None = None) -> UnitRecord:
        """Complete the shards and return what the unit became; refuse files that have changed.

        Args:
            content: The hash of the unit's files, if they were read before.
        """
        self._divide()
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

    def _start_document(self, index: int) -> None:
        unit, plan = self._unit, self._plan
        if unit.held_out != "end":
            self._divide()
        self._document = index
        self._n_documents += 1
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


class _ConversationUnitWriter(_UnitWriter):
    """Sends the conversations of a unit to the shards of their split, whole."""

    def __init__(self, unit: Unit, plan: PreparePlan, tokenizer: Tokenizer) -> None:
        super().__init__(unit, plan, tokenizer)
        self._layout = Layout(tokenizer)
        self._held: list[tuple[Tokens, Mask, int]] = []  # of few conversations, all

    def add(self, batch: TextBatch, encoded: Encoded) -> None:
        """Add a batch of the unit's conversations."""
        self._count_skipped(batch)
        if not batch.texts:
            return
        tokens, trained, places = self._layout.join(encoded.ids, encoded.counts, batch.roles)
        firsts = np.flatnonzero(np.diff(batch.documents, prepend=-1))
        indices = [batch.documents[first] for first in firsts]
        self._n_documents += len(indices)
        lengths = np.diff(places[firsts], append=len(tokens))
        n_bytes = np.add.reduceat(np.asarray(encoded.n_bytes, np.int64), firsts)
        if self._unit.held_out == "end":
            cuts = places[firsts][1:]
            parts = zip(np.split(tokens, cuts), np.split(trained, cuts), strict=True)
            self._held += [(*part, int(n)) for part, n in zip(parts, n_bytes, strict=True)]
            return
        seed, fraction = self._plan.seed, self._plan.val_fraction
        splits = np.array([self._unit.split_of(index, seed, fraction) for index in indices])
        for split in SPLITS:
            chosen = splits == split
            of_split = np.repeat(chosen, lengths)
            self._add(split, tokens[of_split], trained[of_split], lengths[chosen], n_bytes[chosen])

    def _add(
        self, split: Split, tokens: Tokens, trained: Mask, lengths: Lengths, n_bytes: Lengths
    ) -> None:
        writer = self._writers[split]
        assert isinstance(writer, ConversationShardWriter)
        writer.append_conversations(tokens, trained, lengths)
        self._bytes[split] += int(n_bytes.sum())

    def _divide(self) -> None:
        """Hold out the last of few conversations, at least one where there are two."""
        n, fraction = len(self._held), self._plan.val_fraction
        n_val = max(1, round(n * fraction)) if fraction and n > 1 else 0
        for index, (tokens, trained, n_bytes) in enumerate(self._held):
            split: Split = "train" if index < n - n_val else "val"
            self._add(split, tokens, trained, np.array([len(tokens)]), np.array([n_bytes]))
        self._held.clear()


class _StoredUnitWriter(_UnitWriter):
    """Stores what a unit's batches became, and their documents' keys, until all units are there."""

    def __init__(self, unit: Unit, plan: PreparePlan, tokenizer: Tokenizer) -> None:
        super().__init__(unit, plan, tokenizer)
        assert plan.data.dedup is not None
        journal = Journal(plan.folder)
        self._paths = [journal.file(unit.index, suffix) for suffix in (".tokens", ".keys")]
        self._file, keys = (self.enter_context(atomic.atomic_write(path)) for path in self._paths)
        self._key_file = KeyFile(keys)
        self._keys = keys_of(plan.data.dedup, self._key_file.append)
        self._n_tokens = 0

    def add(self, batch: TextBatch, encoded: Encoded) -> None:
        """Add a batch of the unit's texts."""
        self._count_skipped(batch)
        with atomic.storage_errors(self._plan.folder):
            self._keys.add(batch)
            store(self._file, batch, encoded)
        self._n_documents = max(self._n_documents, 1 + max(batch.documents, default=-1))
        self._n_tokens += len(encoded.ids)
        self._bytes["train"] += sum(encoded.n_bytes)

    def _divide(self) -> None:
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
