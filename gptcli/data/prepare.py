"""Text to shards: units are tokenized, in this process or several, and the manifest comes last.

The bytes written depend on the source, the recipe and nothing else, such as the number of
workers. Knows no terminal.
"""

import contextlib
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from gptcli import durable
from gptcli.config.schema import Config, DataConfig, TokenizerConfig
from gptcli.data import shards
from gptcli.data.shards import Counts, Manifest, Recipe, TokenizerRecord, UnitRecord
from gptcli.data.sources import Source, Unit, data_dir, documents, find_source, fingerprint
from gptcli.data.tokenize import OnProgress, write_unit
from gptcli.errors import ConfigError, DataError
from gptcli.tokenizers import (
    Tokenizer,
    dump_tokenizer,
    load_tokenizer,
    make_tokenizer,
    tokenizer_from,
)

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
    made = [path for path in (plan.folder, *plan.folder.parents) if not path.exists()]
    durable.make_folder(plan.folder)
    durable.remove_leftovers(plan.folder)
    if existing is not None:
        _remove(plan.folder, existing)
    try:
        units = list(_run(plan, tokenizer, workers, on_progress))
        record = TokenizerRecord(
            name=tokenizer.name, vocab_size=tokenizer.vocab_size, sha256=tokenizer.fingerprint
        )
        manifest = Manifest(
            recipe=_recipe(plan, record),
            dtype=shards.dtype_for(tokenizer.vocab_size),
            documents=sum(unit.documents for unit in units),
            tokens=sum((unit.tokens for unit in units), Counts()),
            bytes=sum((unit.bytes for unit in units), Counts()),
            units=units,
        )
        _refuse_empty(plan, manifest)
        durable.write_bytes(plan.folder / shards.TOKENIZER, dump_tokenizer(tokenizer))
        content = manifest.model_dump_json(indent=1) + "\n"
        durable.write_bytes(plan.folder / shards.MANIFEST, content.encode())
    except BaseException:
        for name in (shards.MANIFEST, shards.TOKENIZER):
            (plan.folder / name).unlink(missing_ok=True)
        for unit, split in itertools.product(plan.source.units, ("train", "val")):
            for path in plan.folder.glob(f"{split}_{unit.index:06d}_[0-9][0-9][0-9].bin"):
                path.unlink()
        with contextlib.suppress(OSError):  # somebody has put a file there
            for path in made:
                path.rmdir()
        raise
    return manifest


def _recipe(plan: Plan, tokenizer: TokenizerRecord) -> Recipe:
    return Recipe(
        source=plan.source.name,
        revision=plan.source.revision,
        text_field=plan.data.text_field,
        encoding_errors=plan.data.encoding_errors,
        val_fraction=plan.val_fraction,
        seed=plan.seed,
        shard_tokens=plan.data.shard_tokens,
        max_vocab_size=plan.tokenizer.vocab_size,
        tokenizer=tokenizer,
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
    wanted = _recipe(plan, record).model_dump()
    found = existing.recipe.model_dump()
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
    shards.read_tokenizer(plan.folder, existing)
    for split in ("train", "val"):
        shards.TokenReader(plan.folder, existing, split).close()
    return existing


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
    plan: Plan, tokenizer: Tokenizer, workers: int, on_progress: OnProgress
) -> Iterator[UnitRecord]:
    """Prepare the units, and yield their records in the units' order."""
    units = plan.source.units
    workers = min(workers, len(units))
    if workers <= 1:
        for unit in units:
            yield _write(plan, unit, tokenizer, on_progress)
        return
    # Spawned, not forked: the same on every system, and safe beside threads.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        definition = tokenizer.definition()
        futures = [pool.submit(_work, plan, unit, definition) for unit in units]
        try:
            for future in as_completed(futures):
                record = future.result()
                on_progress(record.bytes.train + record.bytes.val)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        for future in futures:
            yield future.result()


def _work(plan: Plan, unit: Unit, definition: dict[str, Any]) -> UnitRecord:
    """Prepare a unit in a worker process."""
    return _write(plan, unit, tokenizer_from(definition), lambda n_bytes: None)


def _write(plan: Plan, unit: Unit, tokenizer: Tokenizer, on_progress: OnProgress) -> UnitRecord:
    return write_unit(
        unit,
        plan.folder,
        tokenizer,
        plan.data,
        seed=plan.seed,
        val_fraction=plan.val_fraction,
        on_progress=on_progress,
    )
