"""Text to shards: units are tokenized, in this process or several, and the manifest comes last.

The bytes written depend on the source, the recipe and nothing else, such as the number of
workers. Knows no terminal.
"""

import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from gptcli import durable
from gptcli.config.schema import Config, DataConfig, TokenizerConfig
from gptcli.data import shards
from gptcli.data.shards import Counts, Manifest, Recipe, ShardWriter, TokenizerRecord, UnitRecord
from gptcli.data.sources import Source, Unit, data_dir, documents, find_source, fingerprint
from gptcli.errors import ConfigError, DataError
from gptcli.tokenizers import (
    Tokenizer,
    UnknownCharacters,
    dump_tokenizer,
    load_tokenizer,
    make_tokenizer,
    tokenizer_from,
)

OnProgress = Callable[[int], None]
"""Called with the bytes of text done since the last call."""

_REPORT_BYTES = 1 << 18
_SPOOL_BYTES = 1 << 26
_BPE_SAMPLE_CHARS = 200_000_000  # enough for any vocabulary; more only takes longer


@dataclass(frozen=True)
class Plan:
    """What a call of `prepare` is going to do."""

    folder: Path
    source: Source
    data: DataConfig
    tokenizer: TokenizerConfig
    seed: int
    val_fraction: float


@dataclass(frozen=True)
class Job:
    """All that a worker needs to prepare a unit; travels between processes."""

    unit: Unit
    plan: Plan
    tokenizer: dict[str, Any]


def make_plan(config: Config) -> Plan:
    """Find the source of `config` and settle what it leaves open.

    Raises:
        ConfigError: Unknown source.
        DataError: The source cannot be found.
    """
    source = find_source(config.data, config.seed)
    data = config.data
    if source.text_field and not config.is_set("data.text_field"):
        data = data.model_copy(update={"text_field": source.text_field})
    fraction = source.val_fraction(data)
    return Plan(data_dir(data), source, data, config.tokenizer, config.seed, fraction)


def prepare(
    plan: Plan,
    *,
    workers: int = 1,
    force: bool = False,
    on_progress: OnProgress = lambda n_bytes: None,
) -> Manifest:
    """Tokenize the source and write the data folder; a finished one is left as it is.

    Args:
        plan: What to do.
        workers: Processes that tokenize.
        force: Write anew over a folder that holds other data.
        on_progress: Called as text is done.

    Raises:
        ConfigError: Unknown tokenizer, or the folder holds other data.
        DataError: The text cannot be used; nothing is left behind.
        StorageError: The disk is full or may not be written.
    """
    existing = _existing(plan)
    if existing is not None and not force:
        return _same_or_refuse(existing, plan)
    tokenizer = make_tokenizer(plan.tokenizer, lambda: _sample(plan))
    jobs = [Job(unit, plan, tokenizer.definition()) for unit in plan.source.units]
    is_new = not plan.folder.exists()
    durable.make_folder(plan.folder)
    durable.remove_leftovers(plan.folder)
    if existing is not None:
        _remove(plan.folder, existing)
    try:
        records = list(_run(jobs, tokenizer, workers, on_progress))
        manifest = Manifest(
            recipe=_recipe(plan, tokenizer),
            dtype=shards.dtype_for(tokenizer.vocab_size),
            documents=sum(record.documents for record in records),
            tokens=sum((record.tokens for record in records), Counts()),
            bytes=sum((record.bytes for record in records), Counts()),
            units=records,
        )
        _refuse_empty(plan, manifest)
    except BaseException:
        for job, split in itertools.product(jobs, ("train", "val")):
            for path in plan.folder.glob(f"{split}_{job.unit.index:06d}_[0-9][0-9][0-9].bin"):
                path.unlink()
        if is_new:
            plan.folder.rmdir()
        raise
    durable.write_bytes(plan.folder / shards.TOKENIZER, dump_tokenizer(tokenizer))
    content = manifest.model_dump_json(indent=1) + "\n"
    durable.write_bytes(plan.folder / shards.MANIFEST, content.encode())
    return manifest


def _recipe(plan: Plan, tokenizer: Tokenizer) -> Recipe:
    return Recipe(
        source=plan.source.name,
        revision=plan.source.revision,
        text_field=plan.data.text_field,
        encoding_errors=plan.data.encoding_errors,
        val_fraction=plan.val_fraction,
        seed=plan.seed,
        shard_tokens=plan.data.shard_tokens,
        max_vocab_size=plan.tokenizer.vocab_size,
        tokenizer=TokenizerRecord(
            name=tokenizer.name, vocab_size=tokenizer.vocab_size, sha256=tokenizer.fingerprint
        ),
    )


def _existing(plan: Plan) -> Manifest | None:
    """Return the manifest of a finished folder; refuse one that holds somebody else's files."""
    if (plan.folder / shards.MANIFEST).exists():
        return shards.read_manifest(plan.folder)
    tokenizer = plan.folder / shards.TOKENIZER
    if tokenizer.exists():  # ours from a run that was cut off, or a model's of another program
        try:
            ours = json.loads(tokenizer.read_bytes()).get("format") == "gptcli-tokenizer"
        except (OSError, ValueError, AttributeError):
            ours = False
        if not ours:
            raise ConfigError(
                f"{plan.folder} holds files of another program ({shards.TOKENIZER})",
                "choose another folder with --out",
            )
    return None


def _same_or_refuse(existing: Manifest, plan: Plan) -> Manifest:
    """Return `existing` if preparing again would write the same, else say what differs."""
    name = plan.tokenizer.name
    record = existing.tokenizer
    if plan.tokenizer.path is not None:
        known = load_tokenizer(Path(plan.tokenizer.path))
        same_tokenizer = known.fingerprint == record.sha256
    else:
        same_tokenizer = name == record.name
    wanted = _recipe_without_tokenizer(plan)
    found = existing.recipe.model_dump(exclude={"tokenizer"})
    differing = [key for key in wanted if wanted[key] != found[key]]
    if not same_tokenizer:
        differing.insert(0, f"tokenizer ({record.name} there, {name} here)")
    if not differing:
        units = [(unit.name, fingerprint(unit)) for unit in plan.source.units]
        if units != [(unit.name, unit.sha256) for unit in existing.units]:
            differing = ["the source's files"]
    if differing:
        raise ConfigError(
            f"{plan.folder} holds other data; it differs in: {', '.join(differing)}",
            "write it anew with --force, or choose another folder with --out",
        )
    for split in ("train", "val"):
        shards.TokenReader(plan.folder, existing, split).close()  # type: ignore[arg-type]
    return existing


def _recipe_without_tokenizer(plan: Plan) -> dict[str, Any]:
    return {
        "source": plan.source.name,
        "revision": plan.source.revision,
        "text_field": plan.data.text_field,
        "encoding_errors": plan.data.encoding_errors,
        "val_fraction": plan.val_fraction,
        "seed": plan.seed,
        "shard_tokens": plan.data.shard_tokens,
        "max_vocab_size": plan.tokenizer.vocab_size,
    }


def _remove(folder: Path, manifest: Manifest) -> None:
    """Remove the files a manifest lists, itself first: what is left is an unfinished folder."""
    listed = [shard.file for unit in manifest.units for shard in unit.shards]
    for name in [shards.MANIFEST, *listed, shards.TOKENIZER]:
        if Path(name).name != name:
            raise DataError(f"{folder / shards.MANIFEST}: lists a file outside the folder: {name}")
        with durable.storage_errors(folder / name):
            (folder / name).unlink(missing_ok=True)


def _refuse_empty(plan: Plan, manifest: Manifest) -> None:
    if not manifest.bytes.train + manifest.bytes.val:
        raise DataError(f"{plan.source.name}: no text in it ({manifest.documents} documents)")
    if not manifest.tokens.train:
        raise DataError(
            f"{plan.source.name}: all of its {manifest.documents} documents fell to validation",
            "choose a smaller -s data.val_fraction",
        )
    if plan.val_fraction and not manifest.tokens.val:
        raise DataError(
            f"{plan.source.name}: none of its {manifest.documents} documents fell to validation"
            f" (val_fraction {plan.val_fraction:g})",
            "choose a larger -s data.val_fraction, or 0 for no validation",
        )


def _sample(plan: Plan) -> Iterator[str]:
    """Yield text to learn an alphabet or a vocabulary from.

    An alphabet needs all of it. A vocabulary is learned without the documents that are held out,
    so that validation text stays unseen.
    """
    is_bpe = plan.tokenizer.name == "bpe"
    n_chars = 0
    for unit in plan.source.units:
        for index, piece in documents(unit, plan.data):
            if is_bpe:
                if unit.split_of(index, plan.seed, plan.val_fraction) == "val":
                    continue
                n_chars += len(piece)
                if n_chars > _BPE_SAMPLE_CHARS:
                    return
            yield piece


def _run(
    jobs: list[Job], tokenizer: Tokenizer, workers: int, on_progress: OnProgress
) -> Iterator[UnitRecord]:
    """Prepare the units, and yield their records in the units' order."""
    workers = min(workers, len(jobs))
    if workers <= 1:
        for job in jobs:
            yield prepare_unit(job, tokenizer, on_progress)
        return
    # Spawned, not forked: the same on every system, and safe beside threads.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(_work, job) for job in jobs]
        try:
            for future in as_completed(futures):
                record = future.result()
                on_progress(record.bytes.train + record.bytes.val)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        for future in futures:
            yield future.result()


def _work(job: Job) -> UnitRecord:
    """Prepare a unit in a worker process."""
    return prepare_unit(job, tokenizer_from(job.tokenizer), lambda n_bytes: None)


def prepare_unit(job: Job, tokenizer: Tokenizer, on_progress: OnProgress) -> UnitRecord:
    """Tokenize the documents of a unit and write its shards.

    End-of-text stands before each document, as in llm.c's and FineWeb's shards.

    Raises:
        DataError: The text cannot be used, or its files changed meanwhile.
    """
    unit, plan = job.unit, job.plan
    before = fingerprint(unit)
    dtype = shards.dtype_for(tokenizer.vocab_size)
    shape = (unit.index, dtype, plan.data.shard_tokens)
    with (
        ShardWriter(plan.folder, "train", *shape) as train,
        ShardWriter(plan.folder, "val", *shape) as val,
    ):
        writer = _UnitWriter({"train": train, "val": val}, tokenizer)
        current, unreported = -1, 0
        for index, piece in documents(unit, plan.data, tokenizer.safe_cut):
            if index != current:
                writer.end_document()
                current = index
                whole = unit.split_of(index, plan.seed, plan.val_fraction)
                is_cut = unit.held_out == "tail" and plan.val_fraction > 0
                writer.start_document(whole, plan.val_fraction if is_cut else None)
            try:
                unreported += writer.add(piece)
            except UnknownCharacters as error:
                raise DataError(f"{unit.name}: {error.message}", error.hint) from error
            if unreported > _REPORT_BYTES:
                on_progress(unreported)
                unreported = 0
        writer.end_document()
        writer.flush()
        on_progress(unreported)
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


class _UnitWriter:
    """Sends the tokens of documents to the shards of their split, and counts them."""

    def __init__(self, sinks: dict[str, ShardWriter], tokenizer: Tokenizer) -> None:
        self.tokens = {"train": 0, "val": 0}
        self.bytes = {"train": 0, "val": 0}
        self._sinks, self._tokenizer = sinks, tokenizer
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
            self._spool = tempfile.SpooledTemporaryFile(_SPOOL_BYTES)
            self._spool.write(self._eot.tobytes())
        else:
            self._put(split, self._eot)

    def add(self, piece: str) -> int:
        """Add text to the document and return its bytes."""
        ids = self._tokenizer.encode(piece)
        n_bytes = len(piece.encode())
        if self._spool is not None:
            self._spool.write(ids.tobytes())
            self.bytes["train"] += n_bytes
        else:
            self._put(self._split, ids)
            self.bytes[self._split] += n_bytes
        return n_bytes

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
