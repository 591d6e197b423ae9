"""Prepare a source: tokenize its units, in one process or several, and write the manifest last.

The bytes depend only on the source and the recipe, not on the number of workers.
"""

import contextlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from gptcli import atomic, locking
from gptcli.config.schema import Config, DataConfig
from gptcli.data import shards
from gptcli.data.conversations import skipped_rows
from gptcli.data.dedup import keys_of
from gptcli.data.encode import Encoder
from gptcli.data.filters import Rules
from gptcli.data.hub import NetworkError
from gptcli.data.journal import STORED, Journal, remove_prepared
from gptcli.data.presets import data_dir, is_address
from gptcli.data.shards import Manifest, Recipe, TokenizerRecord, UnitRecord
from gptcli.data.sources import LARGE_SOURCE, PreparePlan, Source, find_source
from gptcli.data.units import Fetcher, Unit, content_hash
from gptcli.data.vocabulary import tokenizer_of
from gptcli.data.writer import write_units, write_without_repeats
from gptcli.errors import ConfigError, DataError
from gptcli.formatting import plural
from gptcli.tokenizers import Tokenizer, dump_tokenizer, load_tokenizer

OnWork = Callable[[str, int], None]  # is called with a kind of work and the bytes newly done

_SMALL_BYTES = 32 << 20  # below this, starting workers costs more than it saves


def make_plan(config: Config) -> PreparePlan:
    """Find the source of `config` and settle what it leaves open."""
    if is_address(config.data.dir):
        raise ConfigError(
            f"data.dir: {config.data.dir} is not on this machine, and shards are written to it",
            "choose a folder with --out, then upload it, e.g. with `aws s3 sync`",
        )
    source = find_source(config.data, config.seed)
    data = config.data.model_copy(update={"format": source.format})
    if source.text_field and not config.is_set("data.text_field"):
        data = data.model_copy(update={"text_field": source.text_field})
    if data.filters or data.dedup:
        _require_possible(source, data)
        source = replace(source, expected=None)
    fraction = source.val_fraction(data)
    return PreparePlan(data_dir(data), source, data, config.tokenizer, config.seed, fraction)


def _require_possible(source: Source, data: DataConfig) -> None:
    """Refuse what would leave documents out but cannot."""
    if data.filters:
        Rules(data.filters)
    if data.dedup:
        keys_of(data.dedup, lambda *key: None)
    if any(unit.joined for unit in source.units):
        key = "data.filters" if data.filters else "data.dedup"
        raise ConfigError(
            f"{key}: the rows of {source.name} are lines of one text, not documents",
            f"take {key} out of the configuration",
        )


def is_finished(plan: PreparePlan) -> bool:
    """Tell whether the folder of a plan holds prepared data, of whatever recipe."""
    return (plan.folder / shards.MANIFEST).exists()


def prepare(
    plan: PreparePlan,
    *,
    workers: int | None = 1,
    force: bool = False,
    on_bytes: OnWork = lambda kind, n_bytes: None,
) -> Manifest:
    """Tokenize the source and write the data folder.

    A finished folder is kept as it is, and an unfinished one is resumed: units whose shards are
    there are skipped. `force` replaces other data in the folder.

    Raises:
        ConfigError: Unknown tokenizer, or the folder holds other data.
        DataError: The text cannot be used; if the first unit fails, nothing is left behind.
        RunLockedError: Another process prepares in the folder.
        StorageError: The disk is full or may not be written; finished units are kept.
    """
    if is_finished(plan) and not force:
        with _held(plan.folder, shared=True):
            if (existing := _complete(plan)) is not None:
                return existing
    with _held(plan.folder):
        if not force and (existing := _complete(plan)) is not None:
            return existing
        return _write(plan, workers, force, on_bytes)


def _complete(plan: PreparePlan) -> Manifest | None:
    """Return the manifest of a folder that holds what the plan asks for, None if unfinished."""
    if (existing := find_existing(plan)) is not None:
        Journal(plan.folder).end()  # in case a run was killed right after its manifest
        atomic.remove_leftovers(plan.folder)
    return existing


@contextlib.contextmanager
def _held(folder: Path, shared: bool = False) -> Iterator[None]:
    """Lock the folder, creating it if it is missing; remove it again if it stays empty."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    atomic.make_folder(folder)
    hint = "wait for it, stop it, or choose another folder with --out"
    try:
        with (
            locking.hold(folder, "is preparing this folder", hint, shared=shared),
            atomic.storage_errors(folder),
        ):
            yield
    finally:
        with contextlib.suppress(OSError):
            for path in made:  # fails, and stops, where there is a file
                path.rmdir()


def _write(plan: PreparePlan, workers: int | None, force: bool, on_bytes: OnWork) -> Manifest:
    existing = find_existing(plan, force=True)
    journal = Journal(plan.folder)
    if force:
        journal.discard()
    tokenizer, recipe = _settle(plan, journal)
    atomic.remove_leftovers(plan.folder)
    if existing is not None:
        remove_prepared(plan.folder, existing)
    try:
        units = _run(plan, plan.source.units, tokenizer, recipe, journal, workers, on_bytes)
        return _end(plan, tokenizer, recipe, journal, units)
    except BaseException as error:
        _clean_up(plan, journal, error)
        raise


def _end(
    plan: PreparePlan,
    tokenizer: Tokenizer,
    recipe: Recipe,
    journal: Journal,
    units: list[UnitRecord],
) -> Manifest:
    """Leave out what repeats, and write the manifest over all units."""
    if plan.data.dedup:
        units = write_without_repeats(plan, tokenizer, journal, units)
    manifest = Manifest.of(recipe, units)
    _require_text(plan, manifest)
    shards.write_manifest(plan.folder, manifest)
    journal.end()
    atomic.remove_leftovers(plan.folder)
    return manifest


def prepare_share(
    plan: PreparePlan,
    rank: int,
    world_size: int,
    *,
    workers: int | None = 1,
    on_bytes: OnWork = lambda kind, n_bytes: None,
) -> list[UnitRecord]:
    """Tokenize every world_size-th unit from unit `rank` on; `finalize` writes the manifest.

    Ranks may run at the same time, on any machines that see the folder: none touches what another
    may be writing, and what each unit becomes depends on the unit alone. A rank that is run again
    does what it has not finished.

    Raises:
        ConfigError, DataError, RunLockedError, StorageError: As `prepare`; finished units are kept.
    """
    share = plan.source.units[rank::world_size]
    with _held(plan.folder, shared=True):
        if (existing := find_existing(plan)) is not None:
            return existing.units[rank::world_size]
        journal = Journal(plan.folder)
        tokenizer, recipe = _settle(plan, journal)
        return _run(plan, share, tokenizer, recipe, journal, workers, on_bytes)


def finalize(plan: PreparePlan) -> Manifest:
    """Write the manifest over the units that ranks have prepared.

    Raises:
        ConfigError: The folder holds other data, or the source has changed.
        DataError: Units are missing.
        RunLockedError: A rank is still running.
    """
    with _held(plan.folder, shared=is_finished(plan)):
        if (existing := find_existing(plan)) is not None:
            return existing
        journal = Journal(plan.folder)
        if journal.recipe() is None:
            raise DataError(f"{plan.folder}: no rank has begun", "run the ranks first, with --rank")
        tokenizer, recipe = _settle(plan, journal)
        journal.begin(recipe)  # which compares it
        done = _finished(plan, plan.source.units, journal)
        missing = [unit.index for unit in plan.source.units if unit.index not in done]
        if missing:
            first = ", ".join(map(str, missing[:5])) + ", ..." * (len(missing) > 5)
            raise DataError(
                f"{plan.folder}: {len(missing)} of {len(plan.source.units)} units are not prepared"
                f" yet ({first})",
                "run their ranks again: unit U is rank U modulo --world-size",
            )
        units = [done[unit.index] for unit in plan.source.units]
        return _end(plan, tokenizer, recipe, journal, units)


def _settle(plan: PreparePlan, journal: Journal) -> tuple[Tokenizer, Recipe]:
    """Return the tokenizer, and what the shards' bytes will depend on.

    The tokenizer of an unfinished preparation is used again: nothing is learned twice.
    """
    unfinished, config = journal.recipe(), plan.tokenizer
    if unfinished is not None and config.path is None and config.name == unfinished.tokenizer.name:
        with contextlib.suppress(DataError):
            tokenizer = load_tokenizer(plan.folder / shards.TOKENIZER)
            recipe = _recipe(plan, TokenizerRecord.of(tokenizer))
            if recipe == unfinished:
                return tokenizer, recipe
    tokenizer = tokenizer_of(plan)
    return tokenizer, _recipe(plan, TokenizerRecord.of(tokenizer))


def _clean_up(plan: PreparePlan, journal: Journal, error: BaseException) -> None:
    """Remove what a failed preparation has written, unless it finished units worth keeping."""
    # Text that cannot be used leaves nothing behind, unless hours of work were done before it.
    is_text = isinstance(error, DataError) and not isinstance(error, NetworkError)
    if is_text and journal.n_bytes() < LARGE_SOURCE:
        journal.discard()
    if journal.n_bytes() or is_finished(plan):
        return
    with contextlib.suppress(OSError):
        journal.end()
        (plan.folder / shards.TOKENIZER).unlink(missing_ok=True)
        for unit, split in itertools.product(plan.source.units, shards.SPLITS):
            for path in plan.folder.glob(f"{split}_{unit.index:06d}_[0-9][0-9][0-9].*"):
                if path.suffix in (".bin", shards.MASK, shards.STARTS):
                    path.unlink()


def _recipe(plan: PreparePlan, tokenizer: TokenizerRecord) -> Recipe:
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
        conversation_format=plan.data.format,
        bad_rows=plan.data.bad_rows if plan.data.format else None,
        dedup=plan.data.dedup,
        filters=plan.data.filters.model_dump(exclude_none=True) if plan.data.filters else None,
    )


def find_existing(plan: PreparePlan, force: bool = False) -> Manifest | None:
    """Return the manifest of a finished folder, None if it is not; change nothing.

    Raises:
        ConfigError: It holds files of another program or, without `force`, other data.
        DataError: What it holds is damaged.
    """
    if is_finished(plan):
        existing = shards.read_manifest(plan.folder)
        if not force:
            _require_same(existing, plan)
        return existing
    tokenizer = plan.folder / shards.TOKENIZER
    if tokenizer.exists():  # ours from a run that was cut off, or a model's of another program
        try:
            ours = json.loads(atomic.read_bytes(tokenizer)).get("format") == "gptcli-tokenizer"
        except (OSError, ValueError, AttributeError):
            ours = False
        if not ours:
            raise ConfigError(
                f"{plan.folder} holds files of another program ({shards.TOKENIZER})",
                "choose another folder with --out",
            )
    return None


def _require_same(existing: Manifest, plan: PreparePlan) -> None:
    """Refuse a folder that does not hold what preparing would write, and say why."""
    name = plan.tokenizer.name
    record = existing.tokenizer
    if plan.tokenizer.path is not None:
        same_tokenizer = tokenizer_of(plan).fingerprint == record.sha256
    else:
        same_tokenizer = name == record.name
    differing = _recipe(plan, record).differing(existing.recipe)
    if not same_tokenizer:
        here = name if plan.tokenizer.path is None else f"that of {plan.tokenizer.path}"
        differing.insert(0, f"tokenizer ({record.name} there, {here} here)")
    if not differing:
        units = [(unit.name, content_hash(unit)) for unit in plan.source.units]
        if units != [(unit.name, unit.sha256) for unit in existing.units]:
            differing = ["the source's files"]
    if differing:
        raise ConfigError(
            f"{plan.folder} holds other data; it differs in: {', '.join(differing)}",
            "replace it with --force, or choose another folder with --out",
        )
    shards.read_tokenizer(plan.folder, existing)
    shards.check_shards(plan.folder, existing)


def _require_text(plan: PreparePlan, manifest: Manifest) -> None:
    """Refuse a preparation without text, or with a split without text."""
    name, documents = plan.source.name, plural(manifest.documents, "document")
    is_chosen = manifest.recipe.filters or manifest.recipe.dedup
    if is_chosen and not manifest.documents and (skipped := skipped_rows(manifest.units)):
        reasons = ", ".join(f"{each.rows:,} {reason}" for reason, each in skipped.items())
        raise DataError(
            f"{name}: everything is left out ({reasons})",
            "change data.filters, or look at the text",
        )
    if not manifest.bytes.total:
        what = "conversation" if manifest.is_chat else "text"
        raise DataError(f"{name}: no {what} in it ({documents})")
    if not manifest.tokens.train:
        raise DataError(
            f"{name}: all of it ({documents}) was assigned to validation",
            "choose a smaller -s data.val_fraction",
        )
    if (plan.val_fraction or plan.source.has_val) and not manifest.tokens.val:
        raise DataError(
            f"{name}: none of it ({documents}) was assigned to validation"
            f" (val_fraction {plan.val_fraction:g})",
            "choose a larger -s data.val_fraction, or 0 for no validation",
        )


def _finished(plan: PreparePlan, units: Sequence[Unit], journal: Journal) -> dict[int, UnitRecord]:
    """Return the records of the units that are done; their sources must be as they were."""
    read = journal.stored if plan.data.dedup else journal.record
    done: dict[int, UnitRecord] = {}
    for unit in units:
        if (record := read(unit.index)) is None:
            continue
        if record.sha256 != content_hash(unit):
            raise ConfigError(
                f"{unit.name} has changed since this preparation started", "start over with --force"
            )
        done[unit.index] = record
    return done


def _run(
    plan: PreparePlan,
    units: Sequence[Unit],
    tokenizer: Tokenizer,
    recipe: Recipe,
    journal: Journal,
    workers: int | None,
    on_bytes: OnWork,
) -> list[UnitRecord]:
    """Prepare those of some units that are not done, downloading the next one meanwhile."""
    journal.begin(recipe)
    atomic.write_bytes(plan.folder / shards.TOKENIZER, dump_tokenizer(tokenizer))
    done = _finished(plan, units, journal)
    for record in done.values():
        on_bytes("tokenizing", record.bytes.total)
    todo = [unit for unit in units if unit.index not in done]
    if workers is None:
        workers = os.cpu_count() or 1 if plan.source.n_bytes > _SMALL_BYTES else 1
    with (
        Encoder(tokenizer, workers if todo else 1) as encoder,
        Fetcher(todo, plan.data, partial(on_bytes, "downloading")) as fetcher,
    ):
        on_text = partial(on_bytes, "tokenizing")
        for local, record in write_units(fetcher, plan, tokenizer, encoder, on_text):
            unit = plan.source.units[local.index]
            if unit != local:  # the address of a remote file, not its content
                record = record.model_copy(update={"sha256": content_hash(unit)})
            journal.commit(unit.index, record, STORED if plan.data.dedup else ".json")
            fetcher.release(unit)
            done[unit.index] = record
    return [done[unit.index] for unit in units]
