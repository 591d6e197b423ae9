"""`gpt prepare`: download, tokenize and write token shards."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.commands import complete, examples, options
from gptcli.errors import ConfigError
from gptcli.formatting import count, decimal, duration, plural, size
from gptcli.terminal import console

if TYPE_CHECKING:
    from gptcli.config import Config
    from gptcli.data.estimate import Estimate, LeftOut
    from gptcli.data.shards import Manifest
    from gptcli.data.sources import PreparePlan

_LARGE_BYTES = 32 << 20  # from here on, the plan is worth a line in a log too

Dataset = Annotated[
    str | None,
    options.offered(
        complete.datasets, "DATASET", "Preset, path, glob, address, hf:org/name, or - for stdin."
    ),
]
Workers = Annotated[int | None, options.number("Number of processes; default: one per core.")]
Dedup = Annotated[bool, options.flag("--dedup", "Leave out repeated documents (data.dedup=exact).")]
Finalize = Annotated[
    bool, options.flag("--finalize", "Write the manifest once all ranks are done.")
]


def prepare(
    dataset: Dataset = None,
    config: options.ConfigOption = None,
    set_: options.SetOption = None,
    out: Annotated[str | None, typer.Option(metavar="DIR", help="Output folder.")] = None,
    workers: Workers = None,
    list_: Annotated[bool, options.flag("--list", "List the presets and exit.")] = False,
    dry_run: Annotated[bool, options.flag("--dry-run", "Print the plan and exit.")] = False,
    force: Annotated[bool, options.flag("--force", "Re-prepare, replacing existing data.")] = False,
    dedup: Dedup = False,
    rank: Annotated[int | None, options.number("Prepare this rank's share only.", 0)] = None,
    world_size: Annotated[int | None, options.number("Total number of ranks.")] = None,
    finalize: Finalize = False,
    json_: options.JsonOption = False,
) -> None:
    """Download, tokenize and write uint16 shards."""
    if list_:
        _list(json_)
        return
    _check_share(rank, world_size, finalize, force or dry_run)
    loaded = options.load(
        config,
        set_,
        {"data.source": dataset, "data.dir": out, "data.dedup": "exact" if dedup else None},
    )
    from gptcli.api.prepare import prepare as prepare_data
    from gptcli.data.adopt import token_files

    if (dry_run or rank is not None or finalize) and token_files(loaded.data) is not None:
        raise ConfigError("token files are used in place; there is no work to plan or share")
    if loaded.data.mix is not None and (rank is not None or finalize):
        raise ConfigError("data.mix: share the work on one source at a time: gpt prepare SOURCE")
    if dry_run:
        _show_plans(loaded, force, json_)
        return
    began = time.perf_counter()
    if rank is not None and world_size is not None:
        _prepare_share(loaded, rank, world_size, workers, json_)
        return

    def announce(plan: "PreparePlan", cost: "Estimate") -> None:
        if console.is_live() or plan.source.n_bytes > _LARGE_BYTES:
            console.message(_describe_plan(plan, cost))

    with console.byte_bars() as advance:
        done = prepare_data(
            loaded, workers=workers, force=force, finalize=finalize, on_plan=announce,
            on_bytes=advance,
        )  # fmt: skip
    seconds = time.perf_counter() - began
    if json_:
        console.result_json(done.facts() | {"seconds": round(seconds, 3)})
        return
    for each in done.sources or (done,):
        _report(each.folder, each.manifest, seconds, loaded.seed)
    if (command := examples.next_command(done, loaded, config, set_)) is not None:
        console.message(f"next: {command}")


def _check_share(rank: int | None, world_size: int | None, finalize: bool, is_whole: bool) -> None:
    if (rank is None) != (world_size is None):
        raise ConfigError("--rank and --world-size must be used together")
    if rank is not None and world_size is not None and rank >= world_size:
        raise ConfigError(f"--rank: expected 0 to {world_size - 1}, got {rank}")
    if rank is not None and finalize:
        raise ConfigError("--finalize cannot be combined with --rank")
    if is_whole and (rank is not None or finalize):
        raise ConfigError("--force and --dry-run cannot be combined with --rank or --finalize")


def _show_plans(config: "Config", force: bool, json_: bool) -> None:
    """Print what would be done, for each source of a mixture; refuse what would be refused."""
    from gptcli.data.loader import part_configs

    shown: list[dict[str, Any]] = []
    for each in part_configs(config):
        if config.data.mix is not None and each.data.source is None:
            console.message(f"{each.data.dir} is prepared already, and used as it is")
        else:
            shown.append(_show_plan(each, force, json_))
    if json_:
        console.result_json(shown[0] if config.data.mix is None else {"sources": shown})


def _show_plan(config: "Config", force: bool, json_: bool) -> dict[str, Any]:
    """Print what would be done with one source, unless it goes into JSON; return it."""
    from gptcli.data.estimate import estimate, left_out, require_room
    from gptcli.data.prepare import find_existing, make_plan

    plan = make_plan(config)
    if find_existing(plan, force) is not None and not force:
        console.message(f"{plan.folder} is prepared already; --force prepares it again")
    cost = estimate(plan)
    sample = left_out(plan) if plan.data.filters or plan.data.dedup else None
    more = {"left_out": asdict(sample)} if sample else {}
    if not json_:
        console.result(_describe_plan(plan, cost))
        if sample:
            console.result(_describe_sample(sample))
        require_room(plan, cost)
    return {**_plan_facts(plan), **asdict(cost), **more}


def _describe_sample(sample: "LeftOut") -> str:
    lines = [f"of the first {plural(sample.documents, 'document')}, {sum(sample.rows.values()):,}"
             " would be left out"]  # fmt: skip
    for reason, rows in sorted(sample.rows.items(), key=lambda item: -item[1]):
        lines.append(f"  {reason}: {rows:,} ({rows / sample.documents:.1%})")
        lines += [f"    {example}" for example in sample.examples[reason]]
    return "\n".join(lines)


def _prepare_share(
    config: "Config", rank: int, world_size: int, workers: int | None, json_: bool
) -> None:
    """Prepare a rank's share with progress bars, and say what comes next."""
    from gptcli.data.prepare import make_plan, prepare_share

    began, plan = time.perf_counter(), make_plan(config)
    with console.byte_bars() as advance:
        records = prepare_share(
            plan, rank, world_size, workers=workers, on_bytes=lambda kind, n: advance(kind, n, None)
        )
    seconds = time.perf_counter() - began
    tokens = sum(record.tokens.total for record in records)
    n_bytes = sum(record.bytes.total for record in records)
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


def _report(folder: Path, manifest: "Manifest", seconds: float, seed: int) -> None:
    from gptcli.data.conversations import skipped_rows
    from gptcli.data.inspection import conversations_as_text, windows_as_text

    what, share = "document", ""
    if manifest.is_chat:
        what = "conversation"
        share = (
            f" ({manifest.trained('train') / max(1, manifest.tokens.train):.1%} of them answers)"
        )
    tokenizer, tokens = manifest.tokenizer, manifest.tokens
    total = manifest.bytes.total
    each = total / max(1, tokens.total)
    console.result(
        f"{folder}: {plural(manifest.documents, what)}, {size(total)} of text,"
        f" {tokenizer.name} ({tokenizer.vocab_size:,} ids, {each:.2f} bytes each)"
        f"\n{tokens.train:,} tokens to train on{share}, {tokens.val:,} to validate"
        f" ({manifest.val_share:.2%}), {seconds:.1f} s"
    )
    rows = {reason: each.model_dump() for reason, each in skipped_rows(manifest.units).items()}
    if manifest.recipe.filters or manifest.recipe.dedup:
        noun = "row" if manifest.is_chat else "document"
        console.message(f"left out {options.skipped_rows(rows, noun) or 'nothing'}")
    elif skipped := options.skipped_rows(rows):
        console.message(f"warning: skipped {skipped}", "bold red")
    seq_len = min(24, tokens.train)
    if manifest.is_chat:
        [(_, parts)] = conversations_as_text(
            folder, manifest, "train", count=1, max_tokens=seq_len, seed=seed
        )
        text = "".join(part for part, _ in parts)
    else:
        [window] = windows_as_text(folder, manifest, "train", count=1, seq_len=seq_len, seed=seed)
        text = window.text
    console.message(f"a sample: {' '.join(text.split())[:100]}")


def _plan_facts(plan: "PreparePlan") -> dict[str, Any]:
    return {
        "dir": str(plan.folder),
        "source": plan.source.name,
        "revision": plan.source.revision,
        "files": sum(len(unit.paths) for unit in plan.source.units),
        "source_bytes": plan.source.n_bytes,
        "val_fraction": plan.val_fraction,
        "units": len(plan.source.units),
    }


def _describe_plan(plan: "PreparePlan", cost: "Estimate") -> str:
    facts = _plan_facts(plan)
    revision = f" at {facts['revision'][:12]}" if facts["revision"] else ""
    work = ""
    if cost.seconds is not None:
        about = f"about {duration(cost.seconds)}" if cost.seconds >= 1 else "less than a second"
        work = f", {about} of work"
    val = f"{decimal(100 * plan.val_fraction)}%" if plan.val_fraction else "none"
    if plan.source.has_val:
        val = "its own split"
    download = f", {size(cost.download_bytes)} to download" if cost.download_bytes else ""
    return (
        f"plan: {facts['source']}{revision}, {plural(facts['files'], 'file')},"
        f" {size(facts['source_bytes'])}{download}"
        f"\nto {facts['dir']} with {cost.tokenizer}: about {count(cost.tokens)} tokens,"
        f" {val} for validation{work}"
        f"\ndisk: {size(cost.disk_bytes)} needed, {size(cost.free_bytes)} free"
    )


def _list(json_: bool) -> None:
    from gptcli.data.presets import PRESETS

    if json_:
        named = {name: examples.named_for(name) for name in PRESETS}
        console.result_json(
            {name: asdict(p) | {"examples": named[name]} for name, p in PRESETS.items()}
        )
        return
    rows = [
        (p.name, size(p.download_bytes) if p.download_bytes else "-", p.licence, p.about)
        for p in PRESETS.values()
    ]
    console.table(("preset", "download", "license", "what it is"), rows)
    console.result("")
    console.table(("example (-c)", "data", "what it is"), examples.table())
