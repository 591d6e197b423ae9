"""`gpt doctor`: what the program needs on this machine, each line ok or how to fix it."""

from dataclasses import asdict

import typer

from gptcli import __version__
from gptcli.commands import options
from gptcli.formatting import plural
from gptcli.terminal import console


def doctor(json_: options.JsonOption = False) -> None:
    """Check this machine and show how to fix problems."""
    from gptcli.doctor import run_checks

    with console.bar("checking"):
        checks = dict(run_checks())
    errors = [check for check in checks.values() if check.status == "error"]
    exit_code = errors[0].exit_code if errors else 0
    if json_:
        facts = {name: asdict(check) for name, check in checks.items()}
        console.result_json({"healthy": not errors, "exit_code": exit_code, "checks": facts})
        raise typer.Exit(exit_code)
    rows = [("gptcli", "", __version__)]
    for name, check in checks.items():
        rows.append((name, check.status, check.found))
        if check.remedy is not None:
            rows.append(("", "fix:" if check.status == "error" else "hint:", check.remedy))
    console.table(("", "", ""), rows)
    problems = f"{plural(len(errors), 'problem')} to fix"
    console.result(problems if errors else "all checks passed")
    raise typer.Exit(exit_code)
