"""`gpt runs`: the training runs there are, one of them in full, several side by side."""

import datetime
import shlex
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptcli.commands import complete, options
from gptcli.errors import ConfigError
from gptcli.formatting import NONE, count, duration, loss, perplexity, plural, scored, shares, size
from gptcli.terminal import console

if TYPE_CHECKING:
    from gptcli.runs import RunHistory
    from gptcli.runs.compare import EqualPoint, Figures

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

    found = [figures(read_run(path)) for path in list_runs(Path(folder))]
    if json_:
        console.result_json({"runs": [asdict(run) for run in found]})
        return
    if not found:
        console.message(f"no runs in {folder}/; gpt train -c quickstart makes one")
        return
    rows = [
        (
            run.name,
            f"{run.step:,}{f'/{run.max_steps:,}' if run.max_steps else ''}",
            count(run.tokens),
            loss(run.best_val_loss),
            _state(run),
            _age(run.changed),
            size(run.size_bytes),
        )
        for run in found
    ]
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
    found = figures(read)
    changed = explicit_settings(read.settings, read.facts.given)
    next_ = _next_commands(read)
    if json_:
        console.result_json(
            {
                **asdict(found),
                "perplexity": found.perplexity,
                "settings": changed,
                "data": read.facts.data.model_dump(),
                "seconds_by_work": dict(read.status.seconds_by_work),
                "files": dict(read.checkpoints),
                "problems": list(read.problems),
                "next": next_,
            }
        )
        return
    for name, text in _summary(read, found):
        console.result(f"{name:<11}{text}")
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
        list[str],
        typer.Argument(
            metavar="RUN", help="Two or more run folders or names.", autocompletion=complete.runs
        ),
    ],
    json_: options.JsonOption = False,
) -> None:
    """Compare runs: differing settings, results, losses at equal steps, tokens and time."""
    if len(runs) < 2:
        raise ConfigError("compare takes at least two runs", "`gpt runs list` lists them")
    from gptcli.config.render import to_yaml
    from gptcli.runs import read_run
    from gptcli.runs.compare import differing_settings, equal_points, figures
    from gptcli.runs.find import find_run

    read = [read_run(find_run(name)) for name in runs]
    settings, points = differing_settings(read), equal_points(read)
    found = [figures(run) for run in read]
    if json_:
        console.result_json(
            {
                "runs": [asdict(run) for run in found],
                "settings": settings,
                "equal": [
                    {"unit": point.unit, "amount": point.amount,
                     "val_loss": [one and one[0] for one in point.losses]}
                    for point in points
                ],
            }
        )  # fmt: skip
        return
    names = [run.name for run in read]
    if len(set(names)) < len(names):
        names = [run.folder.as_posix() for run in read]
    rows = [(key, *(to_yaml(value) for value in values)) for key, values in settings.items()]
    rows += [("", *[""] * len(read))] * bool(rows)
    rows += [(name, *(text(run) for run in found)) for name, text in _FIGURES.items()]
    for point in points:
        losses = (_at_point(one, point) for one in point.losses)
        rows.append((f"val loss by {_amount(point.amount, point.unit)}", *losses))
    console.table(("", *names), rows, fold=tuple(range(1, len(names) + 1)))
    data = [run.facts.data for run in read]
    if len({one.tokenizer for one in data}) > 1:
        what = "tokenizers; their losses per token do not compare"
    elif len({one.fingerprint for one in data}) > 1:
        what = "data; their losses do not compare"
    else:
        return
    console.message(f"note: the runs use different {what}", "yellow")


def _summary(run: "RunHistory", found: "Figures") -> list[tuple[str, str]]:
    facts, data = run.facts, run.facts.data
    goal = f" of {found.max_steps:,}" if found.max_steps else ""
    epochs = run.epochs_at(found.step)
    passes = f" {plural(epochs, 'epoch')}," if epochs is not None else ""
    lines = [
        ("run", f"{found.folder}, {_state(found)}, {_age(found.changed)} ago"),
        ("steps", f"{found.step:,}{goal}, {found.tokens:,} tokens,"
                  f"{passes} {duration(found.seconds)}"),
    ]  # fmt: skip
    if run.status.error:
        lines.append(("error", run.status.error.splitlines()[0]))
    part = scored(found.val_tokens, found.val_split_tokens)
    at = f"at step {found.best_step or 0:,}"
    if (best := found.best_val_loss) is not None:
        lines.append(("best", f"val loss {loss(best)}{part} {at}, perplexity {perplexity(best)}"))
    if found.best_epoch_loss is not None:
        lines.append(("best", f"epoch loss {loss(found.best_epoch_loss)} {at}"))
    if found.train_loss is not None:
        val = f", val loss {loss(found.val_loss)}{part}" if found.val_loss is not None else ""
        lines.append(("last", f"train loss {loss(found.train_loss)}{val}"))
    elif found.loss is not None:
        lines.append(("last", f"loss {loss(found.loss)} of the last logged step"))
    if found.tokens_per_second:
        lines.append(("speed", f"{count(found.tokens_per_second)} tokens/s"))
    if spent := shares(run.status.seconds_by_work):
        lines.append(("time", ", ".join(f"{work} {share}" for work, share in spent.items())))
    if found.parameters:
        lines.append(("model", f"{found.parameters:,} parameters"))
    counts = f": {data.tokens.train:,} + {data.tokens.val:,} tokens" * bool(data.tokens.train)
    folders = data.dir or ", ".join(part.dir or name for name, part in data.parts.items()) or NONE
    tokenizer = run.settings.get("tokenizer.name", NONE)
    versions = {"gptcli": facts.gptcli, "torch": facts.torch, "Python": facts.python}
    made = [(facts.created or "")[:16].replace("T", " ")]
    made += [f"{program} {version}" for program, version in versions.items() if version]
    made += [facts.platform or ""]
    lines += [
        ("data", f"{folders}{counts}, tokenizer {tokenizer}"),
        ("size", size(found.size_bytes)),
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


def _at_point(found: tuple[float, float] | None, point: "EqualPoint") -> str:
    """Say a loss, and where it was measured if that is well before the point."""
    if found is None:
        return NONE
    is_early = found[1] < 0.99 * point.amount
    return loss(found[0]) + f" ({_amount(found[1], point.unit)})" * is_early


def _amount(amount: float, unit: str) -> str:
    if unit == "seconds":
        return duration(amount)
    return f"{count(amount) if unit == 'tokens' else f'{amount:,.0f}'} {unit}"


def _state(run: "Figures") -> str:
    code = f" ({run.exit_code})" if run.state == "failed" and run.exit_code is not None else ""
    return run.state + code


def _age(moment: str | None) -> str:
    try:
        then = datetime.datetime.fromisoformat(moment or "")
    except ValueError:
        return NONE
    seconds = (datetime.datetime.now(then.tzinfo) - then).total_seconds()
    return duration(float(max(0, round(seconds))))


_FIGURES: dict[str, Callable[["Figures"], str]] = {
    "state": _state,
    "steps": lambda run: f"{run.step:,}",
    "tokens": lambda run: count(run.tokens),
    "time": lambda run: duration(run.seconds),
    "parameters": lambda run: count(run.parameters),
    "tokens/s": lambda run: count(run.tokens_per_second),
    "last loss": lambda run: loss(run.loss),
    "train loss": lambda run: loss(run.train_loss),
    "val loss": lambda run: loss(run.val_loss),
    "best val loss": lambda run: loss(run.best_val_loss),
    "best epoch loss": lambda run: loss(run.best_epoch_loss),
    "at step": lambda run: NONE if run.best_step is None else f"{run.best_step:,}",
}
