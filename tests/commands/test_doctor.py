"""`gpt doctor`: it finds what is there, and says how to fix what is not."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gptcli import doctor
from support.commands import Gpt
from support.processes import COMMAND_OF_A_COPY

NAMES = ["python", "torch", "device", "dtype", "compiler", "memory", "disk", "tokenizer", "network"]


class Answers(http.server.BaseHTTPRequestHandler):
    """A server that answers, though it has nothing to say."""

    def do_HEAD(self) -> None:
        self.send_response(404)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub_address() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_healthy_machine_needs_nothing(gpt_process: Any, hub_address: str) -> None:
    done = gpt_process("doctor", HF_ENDPOINT=hub_address, NO_COLOR="1")
    assert done.code == 0, done.out
    lines = done.out.splitlines()
    assert lines[-1] == "all checks passed"
    assert [line.split()[0] for line in lines][1:-1] == NAMES
    assert "\x1b" not in done.out
    assert ["network", "ok", hub_address, "answers"] in [line.split() for line in lines]
    assert list(Path().iterdir()) == [], "what was written to measure the disk is gone"


def test_a_hub_that_does_not_answer_is_a_note(gpt_process: Any) -> None:
    found = gpt_process("doctor", "--json", HF_ENDPOINT="http://127.0.0.1:1").json
    assert found["healthy"] and found["exit_code"] == 0
    network = found["checks"]["network"]
    assert network["status"] == "note" and "127.0.0.1:1" in network["found"]
    assert "HF_ENDPOINT" in network["remedy"]


def test_offline_by_choice_is_fine(gpt_process: Any) -> None:
    found = gpt_process("doctor", "--json", HF_HUB_OFFLINE="1").json["checks"]["network"]
    assert found["status"] == "ok" and "HF_HUB_OFFLINE" in found["found"]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no limit of a file's size")
def test_a_disk_that_takes_nothing_ends_with_its_code() -> None:
    line = f'ulimit -f 2; exec "{sys.executable}" -m gptcli doctor --json'
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=env)
    found = json.loads(done.stdout)
    assert done.returncode == found["exit_code"] == 5 and not found["healthy"]
    assert found["checks"]["disk"]["status"] == "error"
    assert list(Path().iterdir()) == []


def test_a_damaged_vocabulary_ends_with_2(tmp_path: Path, fork_server: Gpt) -> None:
    package = Path(doctor.__file__).parent
    copy = tmp_path / "copy" / "gptcli"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    with (copy / "tokenizers" / "gpt2.tiktoken").open("ab") as file:
        file.write(b"x")
    env = {**os.environ, "PYTHONPATH": str(copy.parent), "HF_HUB_OFFLINE": "1"}
    done = fork_server("doctor", code=COMMAND_OF_A_COPY, env=env)
    assert done.code == 2
    said = " ".join(done.out.split())
    assert "tokenizer error" in said and "fix: install gptcli again" in said
    assert done.out.splitlines()[-1] == "1 problem to fix"


@pytest.mark.skipif(sys.platform == "win32", reason="the compiler there is another")
def test_without_a_compiler_there_is_a_note(gpt_process: Any, tmp_path: Path) -> None:
    found = gpt_process("doctor", "--json", PATH=str(tmp_path), HF_HUB_OFFLINE="1").json
    assert found["exit_code"] == 0 and found["checks"]["compiler"]["status"] == "note"
    assert "Python's headers" in found["checks"]["compiler"]["remedy"]


def test_a_check_that_breaks_is_an_error_and_not_the_end(gpt: Any) -> None:
    verdicts = dict(doctor.run_checks())
    assert list(verdicts) == NAMES
    assert all(verdict.remedy for verdict in verdicts.values() if verdict.status != "ok")
