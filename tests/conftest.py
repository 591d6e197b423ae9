"""Fixtures of the whole suite: a tiny corpus, a tiny configuration, and the command line."""

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from gptcli import cli
from gptcli.config import Config, load_config
from support import hub
from support.commands import Gpt, Result, require_good_advice
from support.folders import copy_folder
from support.processes import COMMAND, ForkServer
from support.runs import Tiny, Trained, settings
from support.texts import sentences


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every test work in a folder of its own, and tokenize with tiktoken unless it says so."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTCLI_FAST", "0")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse connections to other machines."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"a test asked for the network: {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture
def without_privileges() -> Callable[[], AbstractContextManager[None]]:
    """Return a context in which this process is an ordinary user, whom permissions stop."""

    if os.name == "nt":
        pytest.skip("Windows keeps no one from reading a file by its mode")

    @contextlib.contextmanager
    def ordinary_user() -> Iterator[None]:
        if os.geteuid() != 0:
            yield
            return
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)

    return ordinary_user


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A text file of about 5 kB."""
    return write_corpus(tmp_path)


def write_corpus(folder: Path) -> Path:
    """Write corpus.txt into a folder."""
    path = folder / "corpus.txt"
    path.write_text(sentences(150), encoding="utf-8", newline="\n")
    return path


@pytest.fixture
def gpt(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Gpt:
    """Run a command line in this process, without a terminal and with an empty stdin."""

    def run(*arguments: str, stdin: bytes = b"") -> Result:
        read, write = os.pipe()
        os.write(write, stdin)
        os.close(write)
        monkeypatch.setattr(sys, "argv", ["gpt", *arguments])
        capfd.readouterr()
        with os.fdopen(read, encoding="utf-8") as file:
            monkeypatch.setattr(sys, "stdin", file)
            code = cli.run(list(arguments))
        captured = capfd.readouterr()
        require_good_advice(captured.out + captured.err)
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def fork_server() -> Iterator[Callable[..., Result]]:
    """Run a command line, or other code, in a process of its own that has torch at hand."""
    if hasattr(os, "fork"):
        with ForkServer() as server:
            yield server.run
        return

    def run(
        *words: str,
        stdin: bytes = b"",
        env: dict[str, str] | None = None,
        code: str = COMMAND,
        folder: Path | None = None,
    ) -> Result:
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            input=stdin, capture_output=True, env=env, cwd=folder, timeout=120,
        )  # fmt: skip
        return Result(done.returncode, done.stdout.decode(), done.stderr.decode())

    yield run


@pytest.fixture
def gpt_process(fork_server: Callable[..., Result]) -> Gpt:
    """Run a command line in a process of its own; keywords are added to its environment."""

    def run(*arguments: str, stdin: bytes = b"", **env: str) -> Result:
        return fork_server(*arguments, stdin=stdin, env={**os.environ, **env})

    return run


@pytest.fixture
def gpt_at(fork_server: Callable[..., Result]) -> Gpt:
    """Run a command line that sees the Hub at an address, in a folder that holds its cache."""

    def run(url: str, *words: str, folder: Path | None = None, **env: str) -> Result:
        place = folder or Path.cwd()
        seen = hub.environment(place, url) | env
        return fork_server(*words, env=seen, code=hub.IMPATIENT, folder=place)

    return run


@pytest.fixture(scope="session")
def prepared_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the corpus and data/tiny, prepared from it as bytes; nobody writes here."""
    folder = tmp_path_factory.mktemp("prepared")
    write_corpus(folder)
    with contextlib.chdir(folder):
        words = ["prepare", "corpus.txt", "--out", "data/tiny", "-s", "tokenizer.name=bytes"]
        assert cli.run(words) == 0
    return folder


@pytest.fixture(scope="session")
def trained(prepared_corpus: Path) -> Trained:
    """Tiny runs that are trained once, for all tests that ask for the same."""
    return Trained(prepared_corpus)


@pytest.fixture(scope="session")
def finished_run(prepared_corpus: Path) -> Path:
    """A tiny run of the command line; nobody writes here."""
    with contextlib.chdir(prepared_corpus), pytest.MonkeyPatch.context() as patch:
        words = ["train", *(part for word in settings() for part in ("-s", word))]
        patch.setattr(sys, "argv", ["gpt", *words])
        assert cli.run(words) == 0
    return prepared_corpus / "runs/tiny"


@pytest.fixture
def data(corpus: Path, prepared_corpus: Path) -> Path:
    """The corpus, prepared as bytes."""
    copy_folder(prepared_corpus / "data/tiny", Path("data/tiny"))
    return Path("data/tiny")


@pytest.fixture
def tiny(data: Path) -> Tiny:
    """Make tiny configurations on the prepared corpus; arguments are `--set` strings."""

    def make(*overrides: str, name: str = "tiny") -> Config:
        return load_config(None, settings(*overrides, name=name))

    return make


@pytest.fixture
def tiny_set(data: Path) -> list[str]:
    """The tiny configuration as command-line words."""
    return [part for word in settings() for part in ("-s", word)]


@pytest.fixture
def run(data: Path, finished_run: Path) -> Path:
    """A finished tiny run."""
    copy_folder(finished_run, Path("runs/tiny"))
    return Path("runs/tiny")


@pytest.fixture
def logged() -> Callable[..., dict[str, Any]]:
    """Make a line of metrics.jsonl for a step."""

    def line(step: int, **more: Any) -> dict[str, Any]:
        return {"step": step, "tokens": step * 64, "loss": 5.0 - step / 10, "lr": 1e-3,
                "grad_norm": 1.0, "tokens_per_second": 100.0, "memory_bytes": 1_000_000,
                "seconds": step * 2.0, **more}  # fmt: skip

    return line


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Write a run folder by hand: its metrics, its samples, and how many seconds old it is."""

    def make(
        name: str,
        metrics: list[dict[str, Any]] | None = None,
        samples: list[dict[str, Any]] | None = None,
        age: int = 0,
    ) -> Path:
        folder = Path("runs") / name
        folder.mkdir(parents=True)
        (folder / "run.json").write_text("{}")
        for file, lines in (("metrics", metrics), ("samples", samples)):
            text = "".join(json.dumps(line) + "\n" for line in lines or [])
            (folder / f"{file}.jsonl").write_text(text)
        for path in folder.iterdir():
            os.utime(path, (1e9 - age, 1e9 - age))
        return folder

    return make
