"""Fixtures of the whole suite: a tiny corpus, a tiny configuration, and the command line."""

import contextlib
import importlib.util
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from gptcli import cli
from gptcli.config import Config, load_config
from gptcli.config.loader import example_files
from gptcli.config.reference import keys
from gptcli.errors import ConfigError

TINY = (
    "model.n_layer=2", "model.n_head=2", "model.n_embd=32", "model.block_size=16",
    "train.micro_batch_size=4", "train.max_steps=6", "train.eval_every=3", "train.log_every=1",
    "train.eval_tokens=64", "optim.lr=3e-3", "generate.max_new_tokens=8",
    "device=cpu", "dtype=float32", "compile=false",
)  # fmt: skip
# A command of ours as it is printed: in backticks, or on lines that say what comes next.
COMMAND = re.compile(r"`(gpt(?:cli)? [a-z][^`]*)`|^(?:next: |      )(gpt [a-z].*)$", re.MULTILINE)
SETTING = re.compile(r"(?<![\w-])-s '?([\w.]+)=")
EAGER = ("--help", "--version", "--install-completion")  # they print and end
PLACEHOLDER = re.compile(r"\.\.\.|VALUE|PLACE|=[A-Z]+$")


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


@pytest.fixture(scope="session")
def hub_module() -> ModuleType:
    """The Hub that stands beside these folders."""
    path = Path(__file__).with_name("hub.py")
    spec = importlib.util.spec_from_file_location("hub", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sentences(count: int, seed: int = 0) -> str:
    """Return plain text that a tiny network can learn something from."""
    words = "the cat sat on a mat and the dog ran to a big red barn by the sea".split()
    lines = []
    state = seed * 7919 + 1
    for _ in range(count):
        picked = []
        for _ in range(8):
            state = (state * 1103515245 + 12345) % 2**31
            picked.append(words[state // 65536 % len(words)])
        lines.append(" ".join(picked).capitalize() + ".\n")
    return "".join(lines)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A text file of about 5 kB."""
    path = tmp_path / "corpus.txt"
    path.write_text(sentences(150), encoding="utf-8", newline="\n")
    return path


def require_understood(words: list[str]) -> None:
    """Refuse a command line behind `gpt` that our parser or the schema refuses.

    Files that it names need not be there, and a value with a placeholder is not looked at.
    """
    words = [word for word in words if word not in EAGER]
    if not words:
        return
    command: Any = cli._command()
    context = command.make_context("gpt", words)
    while hasattr(command, "commands"):
        rest = [*context._protected_args, *context.args]
        if not rest:
            return  # the name of a group
        name, command, rest = command.resolve_command(context, rest)
        if not rest and not hasattr(command, "commands"):
            return  # `gpt export` is the name of a command, whatever it requires
        context = command.make_context(name, rest, parent=context)
    config = context.params.get("config")
    shipped = {path.stem for path in example_files()}
    is_there = config in shipped or Path(config or "").is_file()
    overrides = context.params.get("set_") or []
    for override in overrides:
        if (key := override.partition("=")[0]) not in keys():
            raise ConfigError(f"unknown key '{key}'")
    whole = [text for text in overrides if not PLACEHOLDER.search(text)]
    if is_there or config is None:
        load_config(config, whole)


def require_good_advice(text: str) -> None:
    """Refuse printed commands and settings of `next:`, `hint:` and notes that do not work here."""
    for command in COMMAND.findall(text):
        for part in re.split(r" (?:&&|\|) ", "".join(command)):
            program, *words = shlex.split(part, comments=True)
            assert program in ("gpt", "gptcli"), part
            require_understood(words)
    for line in text.splitlines():
        for key in SETTING.findall(line) if line.startswith(("hint:", "usual:", "next:")) else []:
            assert key in keys(), line


@dataclass
class Result:
    """What a command line printed and returned."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        found: dict[str, Any] = json.loads(self.out)
        return found

    @property
    def err_lines(self) -> list[str]:
        """The lines on stderr."""
        return self.err.splitlines()


Gpt = Callable[..., Result]


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


@pytest.fixture
def gpt_process() -> Gpt:
    """Run a command line in a process of its own."""

    def run(*arguments: str, stdin: bytes = b"", **env: str) -> Result:
        done = subprocess.run(
            [sys.executable, "-m", "gptcli", *arguments],
            input=stdin,
            capture_output=True,
            env={**os.environ, **env},
            timeout=120,
        )
        return Result(done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


@pytest.fixture
def data(corpus: Path, gpt: Gpt) -> Path:
    """The corpus, prepared as bytes."""
    done = gpt("prepare", str(corpus), "--out", "data/tiny", "-s", "tokenizer.name=bytes")
    assert done.code == 0, done.err
    return Path("data/tiny")


@pytest.fixture
def tiny(data: Path) -> Callable[..., Config]:
    """Make tiny configurations on the prepared corpus; arguments are `--set` strings."""

    def make(*overrides: str, name: str = "tiny") -> Config:
        return load_config(None, [*TINY, f"data.dir={data}", f"name={name}", *overrides])

    return make


@pytest.fixture
def tiny_set(data: Path) -> list[str]:
    """The tiny configuration as command-line words."""
    words = [*TINY, f"data.dir={data}", "name=tiny"]
    return [part for word in words for part in ("-s", word)]


@pytest.fixture
def run(tiny_set: list[str], gpt: Gpt) -> Path:
    """A finished tiny run."""
    done = gpt("train", *tiny_set)
    assert done.code == 0, done.err
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
