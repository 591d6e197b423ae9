"""stdout and stderr that are full, closed, or a pipe nobody reads: one rule for every command."""

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TextIO, cast

import pytest

from gptcli import cli
from gptcli.terminal.console import Output

if not Path("/dev/full").exists():
    pytest.skip("needs a device that is always full", allow_module_level=True)

HELP = [
    (*command.split(), "--help")
    for command in (
        "", "prepare", "data", "data info", "data peek", "data verify", "train", "eval", "generate",
        "export", "runs", "runs list", "runs show", "runs compare", "plot", "report", "config",
        "config show", "config schema", "config init", "config explain", "doctor",
    )
]  # fmt: skip
LIGHT = ["--version", "prepare --list", "prepare --list --json", "config show", "config schema",
         "config explain optim.lr", "runs list", "runs list --json", "runs show tiny",
         "runs show tiny --json", "data info data/tiny", "data peek data/tiny",
         "data verify data/tiny", "eval --json", "generate The --max-new-tokens 3",
         "train -c runs/tiny/config.yaml --resume"]  # fmt: skip


def full() -> io.BufferedWriter:
    return open("/dev/full", "wb")


def unread() -> io.BufferedWriter:
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "wb")


def closed() -> io.BufferedWriter:
    return os.fdopen(os.open(os.devnull, os.O_RDONLY), "wb")


Fault = Callable[[], io.BufferedWriter]
Faulty = Callable[[str, Fault], TextIO]
FAULTS = pytest.mark.parametrize("fault", [full, unread, closed])


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    """Let stdout or stderr be one that takes nothing, as `take_output` makes them."""
    made: list[Output] = []

    def take(name: str, fault: Fault) -> TextIO:
        stream = Output(fault(), "utf-8", results=name == "stdout", at_once=False)
        made.append(stream)
        monkeypatch.setattr(sys, name, stream)
        return cast(TextIO, stream)

    yield take
    for stream in made:
        with suppress(Exception):
            stream.close()


@FAULTS
@pytest.mark.parametrize("arguments", [*HELP, ("nosuch",), ("runs", "show", "none", "--json")])
def test_help_and_refusals_whatever_the_output(
    arguments: tuple[str, ...],
    fault: Fault,
    faulty: Faulty,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    refused = 0 if "--help" in arguments else 2
    faulty("stdout", fault)
    assert cli.run([*arguments]) == (refused or (0 if fault is unread else 5))
    err = capfd.readouterr().err
    assert "Traceback" not in err and len(err.splitlines()) <= 2
    assert err.count("error: ") == (0 if fault is unread and not refused else 1)
    faulty("stderr", fault)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert cli.run([*arguments]) == refused


@FAULTS
def test_results_that_are_lost_are_an_error_and_messages_are_not(
    fault: Fault, faulty: Faulty, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages = io.StringIO()
    for command in LIGHT:
        monkeypatch.setattr(sys, "argv", ["gpt", *command.split()])
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", messages)
            faulty("stdout", fault)
            assert cli.run(command.split()) == (0 if fault is unread else 5), command
    for command in LIGHT:
        monkeypatch.setattr(sys, "argv", ["gpt", *command.split()])
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", io.StringIO())
            faulty("stderr", fault)
            assert cli.run(command.split()) == 0, command
    said = messages.getvalue()
    assert "Traceback" not in said
    assert said.count("error: stdout: ") == (0 if fault is unread else len(LIGHT))


@pytest.mark.parametrize(
    ("command", "code"),
    [
        ("config schema >/dev/full", 5),
        ("config schema >&-", 5),
        ("config schema | true", 0),
        ("config schema 2>&-", 0),
        ("--help >/dev/full 2>/dev/full", 5),
        ("--help >&- 2>&- <&-", 5),
        ("nosuch 2>/dev/full", 2),
        ("nosuch --json >&- 2>&-", 2),
    ],
)
def test_a_process_ends_with_the_code_of_the_rule(command: str, code: int) -> None:
    shell = f"{sys.executable} -m gptcli {command}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_no_file_is_opened_under_the_number_of_a_closed_output() -> None:
    code = "from gptcli.terminal.console import take_output; take_output();"
    code += "print(open('x', 'w').fileno() > 2)"
    shell = f"""{sys.executable} -c "{code}" 2>&- <&-"""
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=60)
    assert done.stdout == "True\n"
