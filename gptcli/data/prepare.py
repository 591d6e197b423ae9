"""Prepare a source: tokenize its units, in one process or several, and write the manifest last.

The bytes depend only on the source and the recipe, not on the number of workers.
"""

import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptcli import atomic, locking
from gptcli.config.schema import Config, DataConfig, TokenizerConfig
from gptcli.data import shards
from gptcli.data.download import Fetcher
from gptcli.data.encode import Encoder
from gptcli.data.hub import NetworkError, OnBytes
from gptcli.data.journal import Journal, remove_prepared
from gptcli.data.sample import alphabet_text, vocabulary_text
from gptcli.data.shards import Manifest, Recipe, TokenizerRecord, UnitRecord
from gptcli.data.sources import LARGE_SOURCE, Source, data_dir, find_source
from gptcli.data.units import Unit, content_hash
from gptcli.data.writer import OnProgress, write_units
from gptcli.errors import ConfigError, DataError
from gptcli.formatting import plural
from gptcli.tokenizers import Tokenizer, dump_tokenizer, load_tokenizer, make_tokenizer


@dataclass(frozen=True)
class PreparePlan:
    """What a call of `prepare` is going to do."""

    folder: Path
    source: Source
    data: DataConfig
    tokenizer: TokenizerConfig
    seed: int
    val_fraction: float


def make_plan(config: Config) -> PreparePlan:
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
    return PreparePlan(data_dir(data), source, data, config.tokenizer, config.seed, fraction)


def is_finished(plan: PreparePlan) -> bool:
    """Tell whether the folder of a plan holds prepared data, of whatever recipe."""
    return (plan.folder / shards.MANIFEST).exists()


def prepare(
    plan: PreparePlan,
    *,
    workers: int = 1,
    force: bool = False,
    on_progress: OnProgress = lambda n_bytes: None,
    on_download: OnBytes = lambda n_bytes: None,
) -> Manifest:
    """Tokenize the source and write the data folder.

    A finished folder is left as it is, an unfinished one is gone on with: units whose shards are
    there are not done again.

    Args:
        plan: What to do.
        workers: Processes that tokenize.
        force: Write anew over a folder that holds other data.
        on_progress: Called as text is done.
        on_download: Called as bytes are downloaded.

    Raises:
        ConfigError: Unknown tokenizer, or the folder holds other data.
        DataError: The text cannot be used; a first unit that fails leaves nothing behind.
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
        return _write(plan, workers, force, on_progress, on_download)


def _complete(plan: PreparePlan) -> Manifest | None:
    """Return the manifest of a folder that holds what the plan asks for, None if unfinished."""
    if (existing := find_existing(plan)) is not None:
        Journal(plan.folder).end()  # in case a run was killed after its last word
        atomic.remove_leftovers(plan.folder)
    return existing


@contextlib.contextmanager
def _held(folder: Path, shared: bool = False) -> Iterator[None]:
    """Hold the folder, making it if it is not there; if nothing is put into it, it goes again."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    atomic.make_folder(folder)
    try:
        with (
            locking.hold(
                folder,
                "is preparing this folder",
                "wait for it, stop it, or choose another folder with --out",
                shared=shared,
            ),
            atomic.storage_errors(folder),
        ):
            yield
    finally:
        with contextlib.suppress(OSError):
            for path in made:  # fails, and stops, where there is a file
                path.rmdir()


def _write(
    plan: PreparePlan, workers: int, force: bool, on_progress: OnProgress, on_download: OnBytes
) -> Manifest:
    existing = find_existing(plan, force=True)
    progress = Journal(plan.folder)
    if force:
        progress.discard()
    tokenizer, recipe = _settle(plan, progress)
    atomic.remove_leftovers(plan.folder)
    if existing is not None:
        remove_prepared(plan.folder, existing)
    try:
        progress.begin(recipe)
        atomic.write_bytes(plan.folder / shards.TOKENIZER, dump_tokenizer(tokenizer))
        units = _run(
            plan, plan.source.units, tokenizer, progress, workers, on_progress, on_download
        )
        manifest = _write_manifest(plan, tokenizer, recipe, units)
    except BaseException as error:
        _clean_up(plan, progress, error)
        raise
    progress.end()
    return manifest


def prepare_share(
    plan: PreparePlan,
    rank: int,
    world_size: int,
    *,
    workers: int = 1,
    on_progress: OnProgress = lambda n_bytes: None,
    on_download: OnBytes = lambda n_bytes: None,
) -> list[UnitRecord]:
    """Tokenize every world_size-th unit from unit `rank` on; `finalize` writes the manifest.

    Ranks may work at once, on any machines that see the folder: none touches what another may be
    writing, and what each unit becomes depends on the unit alone. A rank that is run again does
    what it has not finished.

    Raises:
        ConfigError, DataError, RunLockedError, StorageError: As `prepare`; finished units are kept.
    """
    share = plan.source.units[rank::world_size]
    with _held(plan.folder, shared=True):
        if (existing := find_existing(plan)) is not None:
            return existing.units[rank::world_size]
        progress = Journal(plan.folder)
        tokenizer, recipe = _settle(plan, progress)
        progress.begin(recipe)
        atomic.write_bytes(plan.folder / shards.TOKENIZER, dump_tokenizer(tokenizer))
        return _run(plan, share, tokenizer, progress, workers, on_progress, on_download)


def finalize(plan: PreparePlan) -> Manifest:
    """Write the manifest over the units that ranks have prepared.

    Raises:
        ConfigError: The folder holds other data, or the source has changed.
        DataError: Units are missing.
        RunLockedError: A rank is still at work.
    """
    with _held(plan.folder, shared=is_finished(plan)):
        if (existing := find_existing(plan)) is not None:
            return existing
        progress = Journal(plan.folder)
        if progress.recipe() is None:
            raise DataError(f"{plan.folder}: no rank has begun", "run the ranks first, with --rank")
        tokenizer, recipe = _settle(plan, progress)
        progress.begin(recipe)  # which compares it
        done = _finished(plan.source.units, progress)
        missing = [unit.index for unit in plan.source.units if unit.index not in done]
        if missing:
            first = ", ".join(map(str, missing[:5])) + ", ..." * (len(missing) > 5)
            raise DataError(
                f"{plan.folder}: {len(missing)} of {len(plan.source.units)} units are not prepared"
                f" yet ({first})",
                "run their ranks again: unit U is rank U modulo --world-size",
            )
        units = [done[unit.index] for unit in plan.source.units]
        manifest = _write_manifest(plan, tokenizer, recipe, units)
        progress.end()
        atomic.remove_leftovers(plan.folder)
        return manifest


def _settle(plan: PreparePlan, progress: Journal) -> tuple[Tokenizer, Recipe]:
    """Return the tokenizer, and what the shards' bytes will depend on."""
    tokenizer = _tokenizer(plan, progress)
    record = TokenizerRecord(
        name=tokenizer.name, vocab_size=tokenizer.vocab_size, sha256=tokenizer.fingerprint
    )
    return tokenizer, _recipe(plan, record)


def _tokenizer(plan: PreparePlan, progress: Journal) -> Tokenizer:
    """Return the unfinished preparation's tokenizer, or make one: nothing is learned twice."""
    recipe = progress.recipe()
    wanted = plan.tokenizer
    if recipe is not None and wanted.path is None and wanted.name == recipe.tokenizer.name:
        with contextlib.suppress(DataError):
            found = load_tokenizer(plan.folder / shards.TOKENIZER)
            same = found.fingerprint == recipe.tokenizer.sha256
            if same and recipe == _recipe(plan, recipe.tokenizer):
                return found
    return make_tokenizer(wanted, lambda: _sample(plan))


def _clean_up(plan: PreparePlan, progress: Journal, error: BaseException) -> None:
    """Remove what a preparation has written that finished no unit, or none worth keeping."""
    # Text that cannot be used leaves nothing behind, unless hours of work stand before it.
    is_text = isinstance(error, DataError) and not isinstance(error, NetworkError)
    if is_text and progress.n_bytes() < LARGE_SOURCE:
        progress.discard()
    if progress.n_bytes() or (plan.folder / shards.MANIFEST).exists():
        return
    with contextlib.suppress(OSError):
        progress.end()
        (plan.folder / shards.TOKENIZER).unlink(missing_ok=True)
        for unit, split in itertools.product(plan.source.units, shards.SPLITS):
            for path in plan.folder.glob(f"{split}_{unit.index:06d}_[0-9][0-9][0-9].bin"):
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
    )


def find_existing(plan: PreparePlan, force: bool = False) -> Manifest | None:
    """Return the manifest of a finished folder, None if it is not; change nothing.

    Raises:
        ConfigError: It holds files of another program or, without `force`, other data.
        DataError: What it holds is damaged.
    """
    if (plan.folder / shards.MANIFEST).exists():
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
    """Refuse to take `existing` for what preparing again would write, if it is not; say why."""
    name = plan.tokenizer.name
    record = existing.tokenizer
    if plan.tokenizer.path is not None:
        same_tokenizer = make_tokenizer(plan.tokenizer, list).fingerprint == record.sha256
    else:
        same_tokenizer = name == record.name
    wanted, found = _recipe(plan, record).model_dump(), existing.recipe.model_dump()
    differing = [key for key in wanted if wanted[key] != found[key]]
    if not same_tokenizer:
        differing.insert(0, f"tokenizer ({record.name} there, {name} here)")
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
    for split in ("train", "val"):
        shards.TokenReader(plan.folder, existing, split).close()


def _write_manifest(
    plan: PreparePlan, tokenizer: Tokenizer, recipe: Recipe, units: list[UnitRecord]
) -> Manifest:
    """Write the manifest over all units; refuse a split without text."""
    manifest = Manifest.of(recipe, shards.dtype_for(tokenizer.vocab_size), units)
    if not manifest.bytes.train + manifest.bytes.val:
        raise DataError(
            f"{plan.source.name}: no text in it ({plural(manifest.documents, 'document')})"
        )
    if not manifest.tokens.train:
        raise DataError(
            f"{plan.source.name}: all of it ({plural(manifest.documents, 'document')}) was"
            " assigned to validation",
            "choose a smaller -s data.val_fraction",
        )
    if (plan.val_fraction or plan.source.has_val) and not manifest.tokens.val:
        raise DataError(
            f"{plan.source.name}: none of it ({plural(manifest.documents, 'document')}) was"
            f" assigned to validation (val_fraction {plan.val_fraction:g})",
            "choose a larger -s data.val_fraction, or 0 for no validation",
        )
    shards.write_manifest(plan.folder, manifest)
    return manifest


def _sample(plan: PreparePlan) -> Iterator[str]:
    """Return the text to learn an alphabet or a vocabulary from."""
    if plan.tokenizer.name == "bpe":
        return vocabulary_text(plan.source.units, plan.data, plan.seed, plan.val_fraction)
    return alphabet_text(plan.source.units, plan.data)


def _finished(units: Sequence[Unit], progress: Journal) -> dict[int, UnitRecord]:
    """Return the records of the units that are done; their sources must be as they were."""
    done: dict[int, UnitRecord] = {}
    for unit in units:
        record = progress.record(unit.index)
        if record is None:
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
    progress: Journal,
    workers: int,
    on_progress: OnProgress,
    on_download: OnBytes,
) -> list[UnitRecord]:
    """Prepare those of some units that are not done, fetching the next while one is tokenized."""
    done = _finished(units, progress)
    for record in done.values():
        on_progress(record.bytes.train + record.bytes.val)
    todo = [unit for unit in units if unit.index not in done]
    with (
        Encoder(tokenizer, workers if todo else 1) as encoder,
        Fetcher(todo, plan.data, on_download) as fetcher,
    ):
        for local, record in write_units(
            fetcher.all(),
            plan.folder,
            tokenizer,
            encoder,
            plan.data,
            seed=plan.seed,
            val_fraction=plan.val_fraction,
            on_progress=on_progress,
        ):
            unit = plan.source.units[local.index]
            if unit != local:  # the address of a file of the network, not its content
                record = record.model_copy(update={"sha256": content_hash(unit)})
            progress.commit(unit.index, record)
            fetcher.release(unit)
            done[unit.index] = record
    return [done[unit.index] for unit in units]
