"""`gpt report`: a run as one page for a browser."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from gptcli.commands import complete, options
from gptcli.formatting import moment, size
from gptcli.terminal import console


def report(
    run: Annotated[
        str | None,
        typer.Argument(
            metavar="RUN",
            help="Run folder or run name; default: the newest run.",
            autocompletion=complete.runs,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Output file; default: RUN/report.html."),
    ] = None,
    json_: options.JsonOption = False,
) -> None:
    """Write a self-contained HTML report of a run."""
    from gptcli.plotting import require_ending
    from gptcli.plotting.report import FORMATS, write_report
    from gptcli.runs import find_run, read_run
    from gptcli.runs.compare import figures

    if out is not None:
        require_ending(out, *FORMATS)
    folder = find_run(run)
    found = read_run(folder)
    for problem in found.problems:
        console.message(f"note: {problem}")
    file = out or folder / "report.html"
    now = moment()
    n_bytes = write_report(found, file, now)
    if json_:
        console.result_json({"file": str(file), "bytes": n_bytes, "run": asdict(figures(found))})
    else:
        console.result(f"{file}: {size(n_bytes)}")
