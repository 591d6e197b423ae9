"""Ctrl-C at any moment of a process, from its first import to its last breath: 130, and silent."""

import json
import os
import signal
import subprocess
import sys

import pytest

if not hasattr(os, "fork"):
    pytest.skip("no signals to send", allow_module_level=True)

# Presses Ctrl-C when some of the imports begin, and again while the interpreter goes down.
PROGRAM = """
import atexit, os, signal, sys
from gptcli.__main__ import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
at, seen = {at}, 0
def press(event="", arguments=()):
    global seen
    seen += event == "import"
    if event == "import" and at <= seen < at + {presses} or event == "exit":
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(press)
atexit.register(press, "exit")
sys.argv[0] = "gpt"
main()
"""


def pressed(at: int, presses: int, *arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(at=at, presses=presses), *arguments],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
        # A program that is started in the background ignores Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(("arguments", "imports"), [(["--help"], 190), (["doctor", "--json"], 900)])
def test_ctrl_c_during_imports_ends_with_130_and_not_a_word(
    arguments: list[str], imports: int
) -> None:
    for number in range(12):
        at = 1 + imports * number // 12
        code, out, err = pressed(at, 1 + number % 3, *arguments)
        assert (code, err) == (130, ""), at
        if "--json" in arguments:
            assert json.loads(out) == {"error": "interrupted", "hint": None, "exit_code": 130}


def test_ctrl_c_after_the_last_word_changes_nothing() -> None:
    code, out, err = pressed(-1, 0, "--version")
    assert (code, err) == (0, "") and out.startswith("gpt ")


def test_ctrl_c_that_was_ignored_stays_so() -> None:
    shell = f"trap '' INT; {sys.executable} -m gptcli --help & sleep 0.2; kill -INT $!; wait $!"
    assert subprocess.run(["bash", "-c", shell], capture_output=True, timeout=60).returncode == 0
