"""`gpt runs`: the training runs there are, one of them in full, several side by side."""

import datetime
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli import console
from gptcli.commands import complete, options
from gptcli.errors import ConfigError

if TYPE_CHECKING:
    from gptcli.history import RunHistory
    from gptcli.history.comparing import EqualPoint, Figures

app = typer.Typer(help="List, show and compare training runs.")

_NONE = "-"


@app.command("list")
def list_(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Where to look.")] = "runs",
    json_: options.JsonOption = False,
) -> None:
    """List the runs, the newest first."""
    from gptcli.history import list_runs, read_run
    from gptcli.history.comparing import figures

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
            _short(run.tokens),
            _loss(run.best_val_loss),
            _state(run),
            _age(run.changed),
            console.size(run.size_bytes),
        )
        for run in found
    ]
    header = ("run", "steps", "tokens", "best val", "state", "age", "size")
    console.table(header, rows, fold=(0,))


@app.command()
def show(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN",
            help="Run folder or name; default: the newest.",
            autocompletion=complete.runs,
        ),
    ] = None,
    json_: options.JsonOption = False,
) -> None:
    """Show a run: how far it is, its settings, its files and the next command."""
    from gptcli.config.derived import chosen
    from gptcli.config.template import shown
    from gptcli.history import find_run, read_run
    from gptcli.history.comparing import figures

    read = read_run(find_run(run))
    found = figures(read)
    changed = chosen(read.settings)
    next_ = _next_commands(read)
    if json_:
        console.result_json(
            {
                **asdict(found),
                "perplexity": found.perplexity,
                "settings": changed,
                "data": read.facts.data.model_dump(),
                "seconds_by_work": dict(read.seconds_by_work),
                "files": {file.name: file.n_bytes for file in read.checkpoints},
                "problems": list(read.problems),
                "next": next_,
            }
        )
        return
    for name, text in _summary(read, found):
        console.result(f"{name:<11}{text}")
    if changed:
        console.result("\nsettings that are not the defaults")
        console.table(("", ""), [(f"  {key}", shown(value)) for key, value in changed.items()])
    if read.checkpoints:
        console.result("\nfiles")
        rows = [(f"  {file.name}", console.size(file.n_bytes)) for file in read.checkpoints]
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
            metavar="RUN", help="Two run folders or names, or more.", autocompletion=complete.runs
        ),
    ],
    json_: options.JsonOption = False,
) -> None:
    """Compare runs: the settings that differ, the figures, losses at equal points."""
    if len(runs) < 2:
        raise ConfigError("comparing takes two runs or more", "`gpt runs list` names them")
    from gptcli.config.template import shown
    from gptcli.history import find_run, read_run
    from gptcli.history.comparing import differing_settings, equal_points, figures

    read = [read_run(find_run(name)) for name in runs]
    settings, points = differing_settings(read), equal_points(read)
    found = [figures(run) for run in read]
    if json_:
        console.result_json(
            {
                "runs": [asdict(run) for run in found],
                "settings": {key: list(values) for key, values in settings.items()},
                "equal": [
                    {"unit": point.unit, "amount": point.amount,
                     "val_loss": [loss and loss[0] for loss in point.losses]}
                    for point in points
                ],
            }
        )  # fmt: skip
        return
    names = [run.name for run in read]
    if len(set(names)) < len(names):
        names = [run.folder.as_posix() for run in read]
    rows = [(key, *(shown(value) for value in values)) for key, values in settings.items()]
    rows += [("", *[""] * len(read))] * bool(rows)
    rows += _figure_rows(found)
    for point in points:
        losses = (_at_point(loss, point) for loss in point.losses)
        rows.append((f"val loss by {_amount(point.amount, point.unit)}", *losses))
    console.table(("", *names), rows, fold=tuple(range(1, len(names) + 1)))
    _warn_of_data(read)


def _summary(run: "RunHistory", found: "Figures") -> list[tuple[str, str]]:
    """Return what there is to say of a run, line by line."""
    facts, data = run.facts, run.facts.data
    goal = f" of {found.max_steps:,}" if found.max_steps else ""
    lines = [
        ("run", f"{found.folder}, {_state(found)}, {_age(found.changed)} ago"),
        ("steps", f"{found.step:,}{goal}, {found.tokens:,} tokens,"
                  f" {_time(found.seconds)}"),
    ]  # fmt: skip
    if run.status.error:
        lines.append(("error", run.status.error.splitlines()[0]))
    if found.best_val_loss is not None:
        ppl = f", perplexity {found.perplexity:.2f}" if found.perplexity else ""
        lines.append(("best", f"val loss {_loss(found.best_val_loss)} at step"
                              f" {found.best_step:,}{ppl}"))  # fmt: skip
    if found.train_loss is not None:
        lines.append(("last", f"train loss {_loss(found.train_loss)}, val loss"
                              f" {_loss(found.val_loss)}"))  # fmt: skip
    if found.tokens_per_second:
        lines.append(("speed", f"{found.tokens_per_second:,.0f} tokens/s"))
    if run.seconds_by_work:
        total = sum(run.seconds_by_work.values()) or 1.0
        shares = (f"{work} {spent / total:.0%}" for work, spent in run.seconds_by_work.items())
        lines.append(("time", ", ".join(shares)))
    if found.parameters:
        lines.append(("network", f"{found.parameters:,} parameters"))
    counts = f": {data.tokens.train:,} + {data.tokens.val:,} tokens" * bool(data.tokens.train)
    lines.append(
        (
            "data",
            f"{data.dir or _NONE}{counts}, tokenizer {run.settings.get('tokenizer.name', _NONE)}",
        )
    )
    lines.append(("size", console.size(found.size_bytes)))
    versions = {"gptcli": facts.gptcli, "torch": facts.torch, "Python": facts.python}
    made = [(facts.created or "")[:16].replace("T", " ")]
    made += [f"{program} {version}" for program, version in versions.items() if version]
    made += [facts.platform or ""]
    lines.append(("made", ", ".join(part for part in made if part)))
    if facts.command:
        lines.append(("command", shlex.join(["gpt", *facts.command])))
    return lines


def _next_commands(run: "RunHistory") -> list[str]:
    """Return what one would type next: go on with the run, or use its network."""
    folder = run.folder.as_posix()
    usable = any(file.name == "best.pt" for file in run.checkpoints)
    name = run.name if run.folder == Path("runs") / run.name else folder
    use = [shlex.join(["gpt", word, "--checkpoint", name]) for word in ("eval", "generate")]
    if run.state in ("stopped", "failed", "died"):
        words = ["gpt", "train", "-c", f"{folder}/config.yaml", "-s", f"run_dir={folder}"]
        return [shlex.join([*words, "--resume"])]
    return use if usable else []


def _figure_rows(found: "Sequence[Figures]") -> list[tuple[str, ...]]:
    columns: list[tuple[str, Any]] = [
        ("state", _state),
        ("steps", lambda run: f"{run.step:,}"),
        ("tokens", lambda run: _short(run.tokens)),
        ("time", lambda run: _time(run.seconds)),
        ("parameters", lambda run: _short(run.parameters)),
        ("tokens/s", lambda run: _short(run.tokens_per_second)),
        ("train loss", lambda run: _loss(run.train_loss)),
        ("val loss", lambda run: _loss(run.val_loss)),
        ("best val loss", lambda run: _loss(run.best_val_loss)),
        ("at step", lambda run: _NONE if run.best_step is None else f"{run.best_step:,}"),
    ]
    return [(name, *(tell(run) for run in found)) for name, tell in columns]


def _at_point(loss: tuple[float, float] | None, point: "EqualPoint") -> str:
    """Say a loss, and where it was measured if that is well before the point."""
    if loss is None:
        return _NONE
    is_early = loss[1] < 0.99 * point.amount
    return _loss(loss[0]) + f" ({_amount(loss[1], point.unit)})" * is_early


def _amount(amount: float, unit: str) -> str:
    if unit == "seconds":
        return _time(amount)
    return f"{_short(amount) if unit == 'tokens' else f'{amount:,.0f}'} {unit}"


def _warn_of_data(runs: "Sequence[RunHistory]") -> None:
    """Say so when losses per token do not compare."""
    if len({run.facts.data.tokenizer for run in runs}) > 1:
        console.message("note: the tokenizers differ: losses per token do not compare", "yellow")
    elif len({run.facts.data.fingerprint for run in runs}) > 1:
        console.message("note: the data differ, and so does what is validated on", "yellow")


def _state(run: "Figures") -> str:
    code = f" ({run.exit_code})" if run.state == "failed" and run.exit_code is not None else ""
    return run.state + code


def _loss(value: float | None) -> str:
    return _NONE if value is None else f"{value:.4f}"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 10 else console.duration(seconds)


def _short(number: float | None) -> str:
    """Return a number of at most five characters."""
    if number is None:
        return _NONE
    for unit in ("", "k", "M", "B"):
        if number < 1000:
            return f"{number:.0f}" if not unit or number >= 100 else f"{number:.1f}{unit}"
        number /= 1000
    return f"{number:.1f}T"


def _age(moment: str | None) -> str:
    """Return how long ago an ISO time is."""
    try:
        then = datetime.datetime.fromisoformat(moment or "")
    except ValueError:
        return _NONE
    seconds = (datetime.datetime.now(then.tzinfo) - then).total_seconds()
    return f"{seconds / 86400:.0f} d" if seconds > 172800 else console.duration(max(0.0, seconds))
