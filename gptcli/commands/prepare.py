"""`gpt prepare`: download, tokenize and write token shards."""

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.commands import complete, examples, options
from gptcli.commands.following import next_command
from gptcli.errors import ConfigError
from gptcli.formatting import count, decimal, duration, plural, size
from gptcli.terminal import console

if TYPE_CHECKING:
    from gptcli.config import Config
    from gptcli.data.estimate import Estimate
    from gptcli.data.presets import Preset
    from gptcli.data.shards import Manifest
    from gptcli.data.sources import PreparePlan

_SMALL_BYTES = 32 << 20  # below this, starting workers costs more than it saves
_PREPARED = "{} is prepared already; --force prepares it again"


Dataset = Annotated[
    str | None,
    typer.Argument(
        metavar="DATASET",
        help="Preset, path or glob, or hf:org/name.",
        autocompletion=complete.datasets,
    ),
]
Out = Annotated[str | None, typer.Option("--out", metavar="DIR", help="Output folder.")]
Workers = Annotated[
    int | None, typer.Option("--workers", help="Number of processes; default: one per core.")
]
Presets = Annotated[bool, typer.Option("--list", help="List the presets and exit.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan and exit.")]
Force = Annotated[bool, typer.Option("--force", help="Re-prepare, replacing existing data.")]
Rank = Annotated[int | None, typer.Option("--rank", help="Prepare only this rank's share.")]
WorldSize = Annotated[int | None, typer.Option("--world-size", help="Total number of ranks.")]
Finalize = Annotated[
    bool, typer.Option("--finalize", help="Write the manifest once all ranks are done.")
]


def prepare(
    dataset: Dataset = None,
    config: options.ConfigOption = None,
    set_: options.SetOption = None,
    out: Out = None,
    workers: Workers = None,
    list_: Presets = False,
    dry_run: DryRun = False,
    force: Force = False,
    rank: Rank = None,
    world_size: WorldSize = None,
    finalize: Finalize = False,
    json_: options.JsonOption = False,
) -> None:
    """Download, tokenize and write uint16 shards."""
    if list_:
        _list(json_)
        return
    options.require_positive(workers=workers, world_size=world_size)
    is_share = _is_share(rank, world_size, finalize, force or dry_run)
    loaded = options.load(config, set_, {"data.source": dataset, "data.dir": out})
    began = time.perf_counter()
    from gptcli.data.adopt import token_files

    if (ready := token_files(loaded.data)) is not None:
        if dry_run or is_share or finalize:
            raise ConfigError(
                "token files are taken as they are; there is no work to plan or share"
            )
        manifest = _adopt(loaded, *ready)
        _report(ready[0], manifest, began, loaded, config, set_, json_)
        return
    from gptcli.data import prepare as preparing

    plan = preparing.make_plan(loaded)
    if rank is not None and world_size is not None:
        _prepare_share(plan, rank, world_size, workers, json_)
        return
    if finalize:
        manifest = preparing.finalize(plan)
        _warn(plan, manifest)
    else:
        if dry_run:
            _show_plan(plan, force, json_)
            return
        found = None if preparing.is_finished(plan) else _announce(plan)
        manifest = run(plan, workers, force, found)
    _report(plan.folder, manifest, began, loaded, config, set_, json_)


def _is_share(rank: int | None, world_size: int | None, finalize: bool, others: bool) -> bool:
    """Tell whether a rank's share is wanted; refuse options that do not go together."""
    if (rank is None) != (world_size is None):
        raise ConfigError("--rank and --world-size belong together")
    if rank is not None and world_size is not None and not 0 <= rank < world_size:
        raise ConfigError(f"--rank: expected 0 to {world_size - 1}, got {rank}")
    if rank is not None and finalize:
        raise ConfigError("--finalize cannot be combined with --rank")
    if others and (rank is not None or finalize):
        raise ConfigError("--force and --dry-run are for the whole, not for ranks")
    return rank is not None


def _show_plan(plan: "PreparePlan", force: bool, json_: bool) -> None:
    """Print what would be done; refuse what would be refused."""
    from gptcli.data.estimate import estimate, require_room
    from gptcli.data.prepare import find_existing

    if find_existing(plan, force) is not None and not force:
        console.message(_PREPARED.format(plan.folder))
    found = estimate(plan)
    if json_:
        console.result_json({**_plan_facts(plan), **asdict(found)})
        return
    console.result(_describe_plan(plan, found))
    require_room(plan, found)


def _announce(plan: "PreparePlan") -> "Estimate":
    """Say what is going to be done if it is much, and refuse what there is no room for."""
    from gptcli.data.estimate import estimate, require_room

    found = estimate(plan)
    if console.is_live() or plan.source.n_bytes > _SMALL_BYTES:
        console.message(_describe_plan(plan, found))
    require_room(plan, found)
    return found


def _prepare_share(
    plan: "PreparePlan", rank: int, world_size: int, workers: int | None, json_: bool
) -> None:
    """Prepare a rank's share with progress bars, and say what remains to be done."""
    from gptcli.data.prepare import prepare_share

    began = time.perf_counter()
    with console.byte_bars({"tokenizing": None}) as advance:
        records = prepare_share(
            plan,
            rank,
            world_size,
            workers=_workers(plan, workers),
            on_progress=lambda n_bytes: advance("tokenizing", n_bytes),
            on_download=lambda n_bytes: advance("downloading", n_bytes),
        )
    seconds = time.perf_counter() - began
    tokens = sum(record.tokens.train + record.tokens.val for record in records)
    n_bytes = sum(record.bytes.train + record.bytes.val for record in records)
    if json_:
        console.result_json(
            {"dir": str(plan.folder), "rank": rank, "world_size": world_size,
             "units": len(records), "tokens": tokens, "bytes": n_bytes,
             "seconds": round(seconds, 3)}
        )  # fmt: skip
        return
    console.result(
        f"{plan.folder}: rank {rank} of {world_size}, {len(records)} of"
        f" {len(plan.source.units)} units, {size(n_bytes)} of text, {tokens:,} tokens,"
        f" {seconds:.1f} s"
    )
    console.message("when every rank has finished, run it again with --finalize instead of --rank")


def _report(
    folder: Path,
    manifest: "Manifest",
    began: float,
    loaded: "Config",
    config: str | None,
    overrides: list[str] | None,
    json_: bool,
) -> None:
    """Print the result, a sample of it, and the command that comes next."""
    seconds = time.perf_counter() - began
    if json_:
        console.result_json(_facts(folder, manifest, seconds))
        return
    from gptcli.data.inspection import windows_as_text

    console.result(describe(folder, manifest, seconds))
    seq_len = min(24, manifest.tokens.train)
    [(_, text)] = windows_as_text(
        folder, manifest, "train", count=1, seq_len=seq_len, seed=loaded.seed
    )
    console.message(f"a sample: {' '.join(text.split())[:100]}")
    if (command := next_command(folder, manifest, loaded, config, overrides)) is not None:
        console.message(f"next: {command}")


def _adopt(loaded: "Config", folder: Path, preset: "Preset | None", part: str | None) -> "Manifest":
    from gptcli.data.adopt import adopt, fetch_ready_made

    if preset is not None:
        with console.byte_bars({"downloading": None if part else preset.download_bytes}) as advance:
            fetch_ready_made(preset, part, folder, lambda n_bytes: advance("downloading", n_bytes))
    with console.bar(f"reading {folder}") as bar:
        return adopt(folder, loaded, bar.advance)


def _warn(plan: "PreparePlan", manifest: "Manifest") -> None:
    _warn_of_counts(plan, manifest)
    _warn_of_size(plan, manifest)


def _warn_of_counts(plan: "PreparePlan", manifest: "Manifest") -> None:
    """Say so, loudly, when a well-known data set does not have its well-known size."""
    expected = plan.source.expected
    if expected is None:
        return
    found = {"documents": (manifest.documents, expected.documents)}
    if manifest.tokenizer.name == "gpt2":
        total = manifest.tokens.train + manifest.tokens.val
        found["tokens"] = (total, expected.gpt2_tokens)
    for what, (counted, known) in found.items():
        if known is not None and counted != known:
            console.message(
                f"warning: {plan.source.name} should have {known:,} {what}, but {counted:,} were"
                " found: something is missing, or the source has changed",
                "bold red",
            )


def _warn_of_size(plan: "PreparePlan", manifest: "Manifest") -> None:
    """Say so when a vocabulary or the validation split is not of the size that was asked for."""
    wanted, found = plan.tokenizer.vocab_size, manifest.tokenizer.vocab_size
    if plan.tokenizer.name == "bpe" and plan.tokenizer.path is None and wanted and found < wanted:
        console.message(
            f"note: the text has pieces for a vocabulary of {found:,} ids, fewer than the"
            f" {wanted:,} of tokenizer.vocab_size"
        )
    share, fraction = manifest.val_share, plan.val_fraction
    is_drawn = fraction and any(unit.held_out == "documents" for unit in plan.source.units)
    if is_drawn and not 2 / 3 < share / fraction < 1.5:
        console.message(
            f"warning: {share:.2%} of the tokens are for validation, not the {fraction:.2%} of"
            " data.val_fraction: documents are held out as a whole, and there are few or of very"
            " different lengths",
            "bold red",
        )


def run(
    plan: "PreparePlan",
    workers: int | None = None,
    force: bool = False,
    found: "Estimate | None" = None,
) -> "Manifest":
    """Prepare with progress bars; `train` does so too when local data is not prepared yet."""
    from gptcli.data import prepare as preparing

    is_there = preparing.is_finished(plan) and not force
    totals = {"tokenizing": found.text_bytes if found else None}
    if found and found.download_bytes:
        totals = {"downloading": found.download_bytes, **totals}
    with console.byte_bars(totals) as advance:
        manifest = preparing.prepare(
            plan,
            workers=_workers(plan, workers),
            force=force,
            on_progress=lambda n_bytes: advance("tokenizing", n_bytes),
            on_download=lambda n_bytes: advance("downloading", n_bytes),
        )
    if is_there:
        console.message(_PREPARED.format(plan.folder))
    else:
        _warn(plan, manifest)
    return manifest


def _workers(plan: "PreparePlan", wanted: int | None) -> int:
    """Return how many processes tokenize."""
    if wanted is not None:
        return wanted
    return os.cpu_count() or 1 if plan.source.n_bytes > _SMALL_BYTES else 1


def describe(folder: Path, manifest: "Manifest", seconds: float) -> str:
    """Say in a few lines what a data folder holds."""
    tokenizer = manifest.tokenizer
    total = manifest.bytes.train + manifest.bytes.val
    each = total / max(1, manifest.tokens.train + manifest.tokens.val)
    return (
        f"{folder}: {plural(manifest.documents, 'document')}, {size(total)} of text,"
        f" {tokenizer.name} ({tokenizer.vocab_size:,} ids, {each:.2f} bytes each)"
        f"\n{manifest.tokens.train:,} tokens to train on, {manifest.tokens.val:,} to validate"
        f" ({manifest.val_share:.2%}), {seconds:.1f} s"
    )


def _facts(folder: Path, manifest: "Manifest", seconds: float) -> dict[str, Any]:
    return {
        "dir": str(folder),
        "tokenizer": manifest.tokenizer.name,
        "vocab_size": manifest.tokenizer.vocab_size,
        "documents": manifest.documents,
        "tokens": manifest.tokens.model_dump(),
        "bytes": manifest.bytes.model_dump(),
        "shards": sum(len(unit.shards) for unit in manifest.units),
        "seconds": round(seconds, 3),
    }


def _plan_facts(plan: "PreparePlan") -> dict[str, Any]:
    return {
        "dir": str(plan.folder),
        "source": plan.source.name,
        "revision": plan.source.revision,
        "tokenizer": plan.tokenizer.name,
        "files": sum(len(unit.paths) for unit in plan.source.units),
        "source_bytes": plan.source.n_bytes,
        "val_fraction": plan.val_fraction,
        "units": len(plan.source.units),
    }


def _describe_plan(plan: "PreparePlan", found: "Estimate") -> str:
    facts = _plan_facts(plan)
    revision = f" at {facts['revision'][:12]}" if facts["revision"] else ""
    time_ = ""
    if found.seconds is not None:
        time_ = f"about {duration(found.seconds)}" if found.seconds >= 1 else "less than a second"
        time_ = f", {time_} of work"
    val = f"{decimal(100 * plan.val_fraction)}%" if plan.val_fraction else "none"
    if plan.source.has_val:
        val = "its own split"
    to_fetch = size(found.download_bytes) if found.download_bytes else ""
    download = f", {to_fetch} to download" if to_fetch else ""
    return (
        f"plan: {facts['source']}{revision}, {plural(facts['files'], 'file')},"
        f" {size(facts['source_bytes'])}{download}"
        f"\nto {facts['dir']} with {facts['tokenizer']}: about {count(found.tokens)} tokens,"
        f" {val} for validation{time_}"
        f"\ndisk: {size(found.disk_bytes)} needed, {size(found.free_bytes)} free"
    )


def _list(json_: bool) -> None:
    from gptcli.data.presets import PRESETS

    if json_:
        console.result_json(
            {
                name: asdict(p) | {"examples": examples.named_for(name)}
                for name, p in PRESETS.items()
            }
        )
        return
    rows = [
        (
            preset.name,
            size(preset.download_bytes) if preset.download_bytes else "-",
            preset.licence,
            preset.about,
        )
        for preset in PRESETS.values()
    ]
    console.table(("preset", "download", "licence", "what it is"), rows)
    console.result("")
    console.table(("example (-c)", "data", "what it is"), examples.table())
