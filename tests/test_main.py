"""Ctrl-C at any moment of a process, from its first import to its last breath: 130, and silent."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

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


# A command that leaves something open, in a process that has imported torch, which ends at once.
LEFT_OPEN = """
import sys, time, types
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from gptcli import cli
sys.modules["torch"] = types.ModuleType("torch")
def run(arguments):
    global pool
    if arguments == ["thread"]:
        pool = ThreadPoolExecutor(1)
        pool.submit(lambda: (time.sleep(0.3), Path("late.txt").write_text("whole")))
    elif arguments == ["processes"]:
        pool = ProcessPoolExecutor(1, mp_context=get_context("fork"))
        pool.submit(abs, 1).result()
    elif arguments == ["closed"]:
        sys.stdout.close()
    else:
        sys.stdout.write("unread")
    return 3
cli.run = run
cli.main()
"""


@pytest.mark.parametrize("left", ["thread", "processes", "text", "closed"])
def test_a_process_with_torch_ends_at_once_but_not_before_its_work(
    left: str, tmp_path: Path
) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", LEFT_OPEN, left],
            cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (3, "")
    assert left != "thread" or (tmp_path / "late.txt").read_text() == "whole"
