"""`gpt runs`: the training runs there are, one of them in full, several side by side."""

import datetime
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptcli.commands import complete, options
from gptcli.errors import ConfigError
from gptcli.formatting import NONE, count, duration, loss, shares, size
from gptcli.terminal import console

if TYPE_CHECKING:
    from gptcli.runs import RunHistory

app = typer.Typer(help="List, show and compare training runs.")


@app.command("list")
def list_(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder of runs.")] = "runs",
    json_: options.JsonOption = False,
) -> None:
    """List runs, newest first."""
    from gptcli.runs import read_run
    from gptcli.runs.compare import figures
    from gptcli.runs.find import list_runs

    runs = [read_run(path) for path in list_runs(Path(folder))]
    found = [figures(run) for run in runs]
    if json_:
        console.result_json({"runs": found})
        return
    if not found:
        console.message(f"no runs in {folder}/; gpt train -c quickstart makes one")
        return
    rows = [
        (run.name, f"{run.step:,}{f'/{run.max_steps:,}' if run.max_steps else ''}",
         count(facts["tokens"]), loss(facts["best_val_loss"]), _state(run), _age(run),
         size(facts["size_bytes"]))
        for run, facts in zip(runs, found, strict=True)
    ]  # fmt: skip
    header = ("run", "steps", "tokens", "best val", "state", "age", "size")
    console.table(header, rows, fold=(0,))


@app.command()
def show(run: options.RunArgument = None, json_: options.JsonOption = False) -> None:
    """Show a run: progress, settings, files and next commands."""
    from gptcli.config.render import explicit_settings, to_yaml
    from gptcli.runs import read_run
    from gptcli.runs.compare import figures
    from gptcli.runs.find import find_run

    read = read_run(find_run(run))
    changed = explicit_settings(read.settings, read.facts.given)
    next_ = _next_commands(read)
    best = read.best.val_loss if read.best else None
    if json_:
        console.result_json(
            {
                **figures(read),
                "perplexity": math.exp(best) if best is not None and best < 700 else None,
                "settings": changed,
                "data": read.facts.data.model_dump(),
                "seconds_by_work": dict(read.status.seconds_by_work),
                "files": dict(read.checkpoints),
                "problems": list(read.problems),
                "next": next_,
            }
        )
        return
    for name, text in _summary(read):
        console.result(f"{name:<22}{text}")
    if changed:
        console.result("\nsettings that are not the defaults")
        console.table(("", ""), [(f"  {key}", to_yaml(value)) for key, value in changed.items()])
    if read.checkpoints:
        console.result("\nfiles")
        rows = [(f"  {name}", size(n_bytes)) for name, n_bytes in read.checkpoints.items()]
        console.table(("", ""), rows)
    for problem in read.problems:
        console.message(f"note: {problem}", "yellow")
    for command in next_:
        console.message(f"next: {command}")


@app.command()
def compare(
    runs: Annotated[
        list[str], options.offered(complete.runs, "RUN", "Two or more run folders or names.")
    ],
    json_: options.JsonOption = False,
) -> None:
    """Compare runs: differing settings, results, and losses after equal tokens."""
    if len(runs) < 2:
        raise ConfigError("compare takes at least two runs", "`gpt runs list` lists them")
    from gptcli.config.render import to_yaml
    from gptcli.runs import compare as compared
    from gptcli.runs import read_run
    from gptcli.runs.find import find_run

    read = [read_run(find_run(name)) for name in runs]
    settings, (tokens, losses) = compared.differing_settings(read), compared.at_equal_tokens(read)
    if json_:
        equal = {"tokens": tokens, "val_loss": losses}
        facts = [compared.figures(run) for run in read]
        console.result_json({"runs": facts, "settings": settings, "equal": equal})
        return
    names = compared.names_of(read)
    rows = [(key, *(to_yaml(value) for value in values)) for key, values in settings.items()]
    rows += [("", *[""] * len(read))] * bool(rows)
    rows.append(("state", *map(_state, read)))
    shown = [{name: f"{value} {more}".rstrip() for name, value, more in compared.at_a_glance(run)}
             for run in read]  # fmt: skip
    for name in dict.fromkeys(name for one in shown for name in one):
        rows.append((name.lower(), *(one.get(name, NONE) for one in shown)))
    if tokens:
        rows.append((f"val loss by {count(tokens)} tokens", *map(loss, losses)))
    console.table(("", *names), rows, fold=tuple(range(1, len(names) + 1)))
    data = [run.facts.data for run in read]
    if len({one.tokenizer for one in data}) > 1:
        what = "tokenizers; their losses per token do not compare"
    elif len({one.fingerprint for one in data}) > 1:
        what = "data; their losses do not compare"
    else:
        return
    console.message(f"note: the runs use different {what}", "yellow")


def _summary(run: "RunHistory") -> list[tuple[str, str]]:
    from gptcli.runs.compare import at_a_glance, size_on_disk

    facts, data = run.facts, run.facts.data
    lines = [("run", f"{run.folder.as_posix()}, {_state(run)}, {_age(run)} ago")]
    if run.status.error:
        lines.append(("error", run.status.error.splitlines()[0]))
    lines += [(name.lower(), f"{value} {more}".rstrip()) for name, value, more in at_a_glance(run)]
    if spent := shares(run.status.seconds_by_work):
        lines.append(("time", ", ".join(f"{work} {share}" for work, share in spent.items())))
    counts = f": {data.tokens.train:,} + {data.tokens.val:,} tokens" * bool(data.tokens.train)
    folders = data.dir or ", ".join(part.dir or name for name, part in data.parts.items()) or NONE
    tokenizer = run.settings.get("tokenizer.name", NONE)
    versions = {"gptcli": facts.gptcli, "torch": facts.torch, "Python": facts.python}
    made = [(facts.created or "")[:16].replace("T", " ")]
    made += [f"{program} {version}" for program, version in versions.items() if version]
    made += [facts.platform or ""]
    lines += [
        ("data", f"{folders}{counts}, tokenizer {tokenizer}"),
        ("size", size(size_on_disk(run.folder))),
        ("made", ", ".join(part for part in made if part)),
    ]
    if facts.command:
        lines.append(("command", shlex.join(["gpt", *facts.command])))
    return lines


def _next_commands(run: "RunHistory") -> list[str]:
    """Return what one would type next: resume the run, or use its model."""
    from gptcli.runs import BEST
    from gptcli.runs.find import next_commands

    folder = run.folder.as_posix()
    usable = BEST in run.checkpoints
    is_plain = run.folder == Path("runs") / run.name and not run.name.startswith("-")
    name = run.name if is_plain else folder
    if run.state in ("stopped", "failed", "died"):
        words = ["gpt", "train", "-c", f"{folder}/config.yaml", "-s", f"run_dir={folder}"]
        return [shlex.join([*words, "--resume"])]
    return next_commands(name, is_validated=run.best is not None) if usable else []


def _state(run: "RunHistory") -> str:
    code = run.status.exit_code
    return run.state + f" ({code})" * (run.state == "failed" and code is not None)


def _age(run: "RunHistory") -> str:
    try:
        then = datetime.datetime.fromisoformat(run.status.time or run.facts.created or "")
    except ValueError:
        return NONE
    seconds = (datetime.datetime.now(then.tzinfo) - then).total_seconds()
    return duration(float(max(0, round(seconds))))
