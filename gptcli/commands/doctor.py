"""`gpt doctor`: what the program needs on this machine, each line ok or how to fix it."""

import itertools
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer

from gptcli import __version__
from gptcli.commands import options
from gptcli.formatting import plural
from gptcli.terminal import console

if TYPE_CHECKING:
    from gptcli.doctor import Check

_STYLES = {"ok": "green", "note": "yellow", "error": "bold red"}
_WIDTH = 80
_NAME, _STATUS = 12, 7  # columns


def doctor(json_: options.JsonOption = False) -> None:
    """Check this machine and show how to fix problems."""
    from gptcli.doctor import run_checks

    checks: dict[str, Check] = {}
    if not json_:
        console.result(f"gptcli {__version__}")
    for name, check in run_checks():
        checks[name] = check
        if not json_:
            _print(name, check)
    errors = [check for check in checks.values() if check.status == "error"]
    exit_code = errors[0].exit_code if errors else 0
    if json_:
        facts = {name: asdict(check) for name, check in checks.items()}
        console.result_json({"healthy": not errors, "exit_code": exit_code, "checks": facts})
    else:
        problems = f"{plural(len(errors), 'problem')} to fix"
        console.result(problems if errors else "all checks passed")
    raise typer.Exit(exit_code)


def _print(name: str, check: "Check") -> None:
    first, *rest = _wrapped(check.found) or [""]
    status = f"{check.status:<{_STATUS}}"
    console.styled((f"{name:<{_NAME}}", ""), (status, _STYLES[check.status]), (first, ""))
    leads = [""] * len(rest) + ["fix:" if check.status == "error" else "hint:"]
    for lead, line in itertools.zip_longest(leads, rest + _wrapped(check.remedy or "")):
        if line is not None:
            console.result(f"{'':<{_NAME}}{lead or '':<{_STATUS}}{line}")


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(" ".join(text.split()), _WIDTH - _NAME - _STATUS, break_on_hyphens=False)
