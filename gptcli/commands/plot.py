"""`gpt plot` and `gpt report`: a picture of one run or of several, and a run as a page."""

import difflib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gptcli.commands import complete, options
from gptcli.errors import ConfigError, DataError
from gptcli.formatting import moment, size
from gptcli.plotting.curves import Axis, Panel
from gptcli.terminal import console

if TYPE_CHECKING:
    from gptcli.runs import RunHistory

RunsArgument = Annotated[
    list[str] | None,
    options.offered(complete.runs, "RUN...", "Run folders or run names; default: the newest run."),
]


def plot(
    runs: RunsArgument = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", metavar="FILE", help=".png, .svg or .pdf; default: RUN/loss.png."
        ),
    ] = None,
    x: Annotated[Axis, typer.Option("--x", help="X axis.")] = Axis.STEPS,
    panels: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            help="Comma-separated panels: loss, lr, tokens_per_second, memory, grad_norm.",
        ),
    ] = "loss,lr",
    json_: options.JsonOption = False,
) -> None:
    """Plot loss and learning rate of runs, also during training."""
    shown = _panels(panels)
    if out is None and len(runs or ()) > 1:
        raise ConfigError("a figure of several runs needs a file", "name it with -o FILE.png")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("gpt plot needs matplotlib", "install it: pip install 'gptcli[plot]'")
    from gptcli.plotting import require_ending
    from gptcli.plotting.figure import FORMATS, draw_figure
    from gptcli.runs.compare import figures

    if out is not None:
        require_ending(out, *FORMATS)
    names: list[str | None] = [*runs] if runs else [None]
    found = [_read(name, is_logged=True) for name in dict.fromkeys(names)]
    file = out or found[0].folder / "loss.png"
    draw_figure(found, file, x, shown)
    facts = {"file": str(file), "runs": [figures(run) for run in found]}
    console.result_json(facts) if json_ else console.result(str(file))


def _read(name: str | None, *, is_logged: bool = False) -> "RunHistory":
    """Return a run, where `is_logged` one that has something to draw."""
    from gptcli.runs import read_run
    from gptcli.runs.find import find_run

    run = read_run(find_run(name))
    if is_logged and not run.steps and not run.evaluations:
        hint = "the first line is written after train.log_every steps"
        raise DataError(f"{run.folder}: nothing is logged yet", hint)
    for problem in run.problems:
        console.message(f"note: {problem}")
    return run


def _panels(text: str) -> tuple[Panel, ...]:
    found: list[Panel] = []
    for name in (part.strip() for part in text.split(",")):
        if name not in Panel.__members__.values():
            near = difflib.get_close_matches(name, list(Panel), n=1)
            hint = f"did you mean {near[0]}?" if near else f"panels: {', '.join(Panel)}"
            raise ConfigError(f"--panels: unknown panel {name!r}", hint)
        found.append(Panel(name))
    return tuple(dict.fromkeys(found))


def report(
    run: options.RunArgument = None,
    out: Annotated[Path | None, options.output("RUN/report.html")] = None,
    json_: options.JsonOption = False,
) -> None:
    """Write a self-contained HTML report of a run."""
    from gptcli.plotting import page, require_ending
    from gptcli.plotting.report import render
    from gptcli.runs.compare import figures

    if out is not None:
        require_ending(out, *page.FORMATS)
    found = _read(run)
    file = out or found.folder / "report.html"
    n_bytes = page.write(file, render(found, moment()))
    facts = {"file": str(file), "bytes": n_bytes, "run": figures(found)}
    console.result_json(facts) if json_ else console.result(f"{file}: {size(n_bytes)}")
