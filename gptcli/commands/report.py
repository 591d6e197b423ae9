"""`gpt report`: a run as one page for a browser."""

from pathlib import Path
from typing import Annotated

import typer

from gptcli.commands import options
from gptcli.formatting import moment, size
from gptcli.terminal import console


def report(
    run: options.RunArgument = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FILE", help="Output file; default: RUN/report.html."),
    ] = None,
    json_: options.JsonOption = False,
) -> None:
    """Write a self-contained HTML report of a run."""
    from gptcli.plotting import require_ending
    from gptcli.plotting.page import FORMATS
    from gptcli.plotting.report import write_report
    from gptcli.runs import read_run
    from gptcli.runs.compare import figures
    from gptcli.runs.find import find_run

    if out is not None:
        require_ending(out, *FORMATS)
    found = read_run(find_run(run))
    for problem in found.problems:
        console.message(f"note: {problem}")
    file = out or found.folder / "report.html"
    n_bytes = write_report(found, file, moment())
    if json_:
        console.result_json({"file": str(file), "bytes": n_bytes, "run": figures(found)})
    else:
        console.result(f"{file}: {size(n_bytes)}")
