"""`gpt plot`: a picture of one run, or of several over one another."""

import difflib
import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from gptcli.commands import complete, options
from gptcli.errors import ConfigError, DataError
from gptcli.plotting.curves import Axis, Panel
from gptcli.terminal import console

RunsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="RUN...",
        help="Run folders or run names; default: the newest run.",
        autocompletion=complete.runs,
    ),
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
    from gptcli.runs import read_run
    from gptcli.runs.compare import figures
    from gptcli.runs.find import find_run

    if out is not None:
        require_ending(out, *FORMATS)
    found = [read_run(find_run(name)) for name in dict.fromkeys(runs or ())]
    found = found or [read_run(find_run(None))]
    for run in found:
        if not run.steps and not run.evaluations:
            raise DataError(
                f"{run.folder}: nothing is logged yet",
                "the first line is written after train.log_every steps",
            )
        for problem in run.problems:
            console.message(f"note: {problem}")
    file = out or found[0].folder / "loss.png"
    draw_figure(found, file, x, shown)
    if json_:
        console.result_json({"file": str(file), "runs": [figures(run) for run in found]})
    else:
        console.result(str(file))


def _panels(text: str) -> tuple[Panel, ...]:
    found: list[Panel] = []
    for name in (part.strip() for part in text.split(",")):
        if name not in Panel.__members__.values():
            near = difflib.get_close_matches(name, list(Panel), n=1)
            hint = f"did you mean {near[0]}?" if near else f"panels: {', '.join(Panel)}"
            raise ConfigError(f"--panels: unknown panel {name!r}", hint)
        found.append(Panel(name))
    return tuple(dict.fromkeys(found))
