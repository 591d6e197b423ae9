"""`gpt prepare`: download, tokenize and write token shards."""

import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli import console
from gptcli.commands import options

if TYPE_CHECKING:
    from gptcli.config import Config
    from gptcli.data.prepare import Plan
    from gptcli.data.shards import Manifest

_SMALL_BYTES = 64 << 20  # below this, starting workers costs more than it saves


def prepare(
    dataset: Annotated[
        str | None,
        typer.Argument(metavar="[DATASET]", help="Preset, path or glob of text, or hf:org/name."),
    ] = None,
    config: options.ConfigOption = None,
    set_: options.SetOption = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR", help="Folder for the shards.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option("--workers", help="Processes; default: one for each core.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the presets and stop.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done and stop.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Write anew over other prepared data.")
    ] = False,
    json_: options.JsonOption = False,
) -> None:
    """Download, tokenize and write uint16 shards."""
    if list_:
        _list(json_)
        return
    options.require_positive(workers=workers)
    loaded = options.load(config, set_, {"data.source": dataset, "data.dir": out})
    from gptcli.data.prepare import make_plan

    plan = make_plan(loaded)
    if dry_run:
        facts = _plan_facts(plan)
        console.result_json(facts) if json_ else console.result(_describe_plan(facts))
        return
    began = time.perf_counter()
    manifest = run(plan, workers, force)
    seconds = time.perf_counter() - began
    if json_:
        console.result_json(_facts(plan.folder, manifest, seconds))
        return
    console.result(describe(plan.folder, manifest, seconds))
    console.message(f"next: {_next_command(loaded, plan.folder, config, set_)}")


def run(plan: "Plan", workers: int | None = None, force: bool = False) -> "Manifest":
    """Prepare with a progress bar; `train` does so too when local data is not prepared yet."""
    from gptcli.data.prepare import prepare as prepare_data

    source = plan.source
    if workers is None:
        workers = os.cpu_count() or 1 if source.n_bytes > _SMALL_BYTES else 1
    # Bytes of text can be compared with bytes of files only where files are plain text.
    plain = all(
        str(path).endswith((".txt", ".md", ".py")) for u in source.units for path in u.paths
    )
    with console.bar(f"preparing {source.name}", source.n_bytes if plain else None) as bar:
        return prepare_data(plan, workers=workers, force=force, on_progress=bar.advance)


def describe(folder: Path, manifest: "Manifest", seconds: float) -> str:
    """Say in a few lines what a data folder holds."""
    tokenizer = manifest.tokenizer
    total = manifest.bytes.train + manifest.bytes.val
    n_tokens = manifest.tokens.train + manifest.tokens.val
    size = f"{total / 1e6:,.1f} MB" if total >= 1e5 else f"{total / 1e3:.1f} kB"
    return (
        f"{folder}: {manifest.documents:,} documents, {size} of text,"
        f" {tokenizer.name} ({tokenizer.vocab_size} ids, {total / max(1, n_tokens):.2f} bytes each)"
        f"\n{manifest.tokens.train:,} tokens to train on, {manifest.tokens.val:,} to validate,"
        f" {seconds:.1f} s"
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


def _plan_facts(plan: "Plan") -> dict[str, Any]:
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


def _describe_plan(facts: dict[str, Any]) -> str:
    revision = f" at {facts['revision']}" if facts["revision"] else ""
    return (
        f"{facts['source']}{revision}: {facts['files']} files,"
        f" {facts['source_bytes'] / 1e6:,.1f} MB"
        f"\nto {facts['dir']} with {facts['tokenizer']}, {facts['val_fraction']:g} for validation,"
        f" in {facts['units']} units"
    )


def _next_command(
    loaded: "Config", folder: Path, config: str | None, overrides: list[str] | None
) -> str:
    if config is not None:
        return options.command_for("train", config, overrides)
    return options.command_for("train", None, [*(overrides or []), f"data.dir={folder.as_posix()}"])


def _list(json_: bool) -> None:
    from gptcli.data.presets import PRESETS

    if json_:
        console.result_json({name: asdict(preset) for name, preset in PRESETS.items()})
        return
    for preset in PRESETS.values():
        size = f"{preset.download_bytes / 1e9:.1f} GB" if preset.download_bytes else "no download"
        console.result(f"{preset.name:<12} {size:>11}  {preset.licence:<16} {preset.about}")
