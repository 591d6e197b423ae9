"""`gpt doctor`: what the program needs on this machine, each line ok or how to fix it."""

import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from gptcli import __version__
from gptcli.commands import options
from gptcli.terminal import console

if TYPE_CHECKING:
    from gptcli.doctor import Check

_STYLES = {"ok": "green", "note": "yellow", "error": "bold red"}
_WIDTH = 80
_NAME, _STATUS = 12, 7  # columns


def doctor(json_: options.JsonOption = False) -> None:
    """Check this machine and show how to fix problems."""
    from gptcli.doctor import run_checks

    verdicts: dict[str, Check] = {}
    if not json_:
        console.result(f"gptcli {__version__}")
    for name, verdict in run_checks():
        verdicts[name] = verdict
        if not json_:
            _print(name, verdict)
    errors = [verdict for verdict in verdicts.values() if verdict.status == "error"]
    exit_code = errors[0].exit_code if errors else 0
    if json_:
        checks = {name: asdict(verdict) for name, verdict in verdicts.items()}
        console.result_json({"healthy": not errors, "exit_code": exit_code, "checks": checks})
    elif errors:
        s = "s" * (len(errors) > 1)
        console.result(f"{len(errors)} problem{s} to fix")
    else:
        console.result("all checks passed")
    raise typer.Exit(exit_code)


def _print(name: str, verdict: "Check") -> None:
    indent = " " * (_NAME + _STATUS)
    first, *rest = _wrapped(verdict.found)
    status = f"{verdict.status:<{_STATUS}}"
    console.styled((f"{name:<{_NAME}}", ""), (status, _STYLES[verdict.status]), (first, ""))
    for line in rest:
        console.result(indent + line)
    for number, line in enumerate(_wrapped(verdict.remedy or "")):
        lead = " " * _NAME + ("fix:" if verdict.status == "error" else "hint:")
        console.result((indent if number else f"{lead:<{len(indent)}}") + line)


def _wrapped(text: str) -> list[str]:
    width = _WIDTH - _NAME - _STATUS
    return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False) or (
        [] if not text else [text]
    )
