"""`gpt serve` as a process: how it begins, what it refuses, and how it ends."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptcli.commands.serve import _keys
from support.commands import Gpt
from support.processes import until

WORDS = ("-s", "device=cpu", "-s", "dtype=float32", "--json")
LONG = {"model": "tiny", "prompt": "The", "max_tokens": 60000, "stream": True,
        "temperature": 0}  # fmt: skip  # it repeats itself, and never ends


@contextlib.contextmanager
def served(*words: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Start `gpt serve`; yield the process and its port."""
    command = [sys.executable, "-m", "gptcli", "serve", "--port", "0", *WORDS, *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as it:
        try:
            assert it.stdout is not None
            ready = json.loads(it.stdout.readline())
            assert ready["models"] == ["tiny"]
            yield it, int(ready["url"].rpartition(":")[2])
        finally:
            it.kill()


@contextlib.contextmanager
def streaming(port: int, **changes: object) -> Iterator[http.client.HTTPResponse]:
    """Ask for a long stream."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        body = json.dumps(LONG | changes).encode()
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", body, headers)
        answer = connection.getresponse()
        assert answer.status == 200
        yield answer


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
def test_sigterm_finishes_what_is_running_within_its_time(run: Path) -> None:
    with served("--drain", "1") as (process, port), streaming(port) as answer:
        first = answer.readline()
        process.send_signal(signal.SIGTERM)
        rest = answer.read().decode()
        assert first.startswith(b"data: ")
        assert rest.endswith("data: [DONE]\n\n")
        last = json.loads(rest.split("\n\n")[-3].removeprefix("data: "))
        assert last["choices"][0]["finish_reason"] == "length"
        assert process.wait(20) == 0


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM")
@pytest.mark.parametrize(
    ("numbers", "code"), [([signal.SIGTERM, signal.SIGTERM], 0), ([signal.SIGINT], 130)]
)
def test_a_second_sigterm_and_ctrl_c_end_at_once(
    run: Path, numbers: list[signal.Signals], code: int
) -> None:
    with served("--drain", "600") as (process, port), streaming(port) as answer:
        answer.readline()
        for number in numbers:
            process.send_signal(number)
            time.sleep(0.3)
        with contextlib.suppress(http.client.HTTPException, OSError):
            answer.read()
        assert process.wait(20) == code


def test_while_it_ends_it_takes_no_more(run: Path) -> None:
    with served("--drain", "3") as (process, port), streaming(port) as answer:
        answer.readline()
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as other:
            other.request("GET", "/healthz")
            assert other.getresponse().read() == b'{"status": "ok"}'
        threading.Timer(0.2, process.send_signal, [signal.SIGTERM]).start()
        answer.read()
        assert process.wait(20) == 0
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=5)


def test_a_port_in_use_is_a_usage_error_with_another_to_use(run: Path, gpt: Gpt) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = gpt("serve", "--port", str(port), "--json")
    assert done.code == 2
    assert f"127.0.0.1:{port}: Address already in use" in done.err
    assert "--port 0" in json.loads(done.out)["hint"]


def test_other_addresses_need_a_key(run: Path, gpt: Gpt) -> None:
    done = gpt("serve", "--host", "0.0.0.0", "--port", "0")
    assert (done.code, "--api-key-file" in done.err) == (2, True)
    Path("empty").write_text("\n# none\n")
    done = gpt("serve", "--host", "0.0.0.0", "--port", "0", "--api-key-file", "empty")
    assert (done.code, "no keys in" in done.err) == (2, True)
    Path("latin").write_bytes(b"caf\xe9")
    for name, why in (("missing", "No such file"), (".", "Is a directory"), ("latin", "not UTF-8")):
        done = gpt("serve", "--api-key-file", name, "--port", "0")
        assert done.code == 2 and f"--api-key-file {name}: {why}" in done.err, done.err


def test_a_file_of_keys_may_have_comments_and_a_byte_order_mark() -> None:
    Path("keys").write_text("first\n\n  # none\n schlüssel \n", encoding="utf-8-sig")
    assert _keys(Path("keys"), "0.0.0.0") == ["first", "schlüssel"]


def test_a_browser_that_waits_for_the_page_gets_it(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "import sys, urllib.request as r; print(len(r.urlopen(sys.argv[1], timeout=20).read()))"
    Path("browser").write_text(f"#!/bin/sh\nexec {sys.executable} -c '{code}' \"$1\" >size\n")
    Path("browser").chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{Path('browser').resolve()} %s")
    with served("--open"):
        until(lambda: Path("size").is_file() and Path("size").read_text())
    assert int(Path("size").read_text()) > 10_000


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_without_a_place_for_its_result_it_ends(run: Path) -> None:
    command = [sys.executable, "-m", "gptcli", "serve", "--port", "0", *WORDS]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 5
    assert "stdout: No space left" in done.stderr and "Traceback" not in done.stderr


def test_a_checkpoint_that_is_not_there_or_is_named_twice_is_refused(run: Path, gpt: Gpt) -> None:
    done = gpt("serve", "--port", "0", "--checkpoint", "other")
    assert (done.code, "runs here: tiny" in done.err) == (4, True)
    done = gpt("serve", "--port", "0", "--checkpoint", "tiny", "--checkpoint", "tiny")
    assert (done.code, "already a model tiny" in done.err) == (2, True)
