"""What the benchmarks share: runs measured as whole processes, a peer's data, and RESULTS.md."""

import argparse
import datetime
import os
import pickle
import platform
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gptcli import __version__
from gptcli.checkpoint import load_weights
from gptcli.data.shards import TokenReader, read_manifest, read_tokenizer
from gptcli.data.units import library_packages
from gptcli.device import Runtime
from gptcli.evaluation import evaluate
from gptcli.interop.pretrained import open_pretrained
from gptcli.model import GPT as Network

CPU = Runtime(torch.device("cpu"), torch.float32, compile=False, deterministic=False)
RESULTS = Path(__file__).parent / "RESULTS.md"
GPT = [sys.executable, "-m", "gptcli"]


# Classes of processors that a newer one can stand in for: what torch calls their vectors.
CLASSES = {"AMX": None, "AVX512_CORE_BF16": "avx512", "AVX512_CORE": "avx512", "AVX2": "avx2"}
_stood_in = ""  # the class that programs started from here behave as


def parse_with_isa(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Add --isa to a benchmark's options, and limit the programs it starts to that class.

    oneDNN, torch and MKL are limited; AMX, the newest, limits nothing.
    """
    global _stood_in
    parser.add_argument("--isa", choices=["native", *CLASSES], default="native")
    options = parser.parse_args()
    if options.isa != "native":
        _stood_in = options.isa
    if (vectors := CLASSES.get(options.isa)) is not None:
        os.environ["ONEDNN_MAX_CPU_ISA"] = options.isa
        os.environ["ATEN_CPU_CAPABILITY"] = vectors
        os.environ["MKL_ENABLE_INSTRUCTIONS"] = vectors.upper()
    return options


@dataclass(frozen=True)
class Measured:
    """A process that has ended: wall time, its own peak memory, and what it printed."""

    seconds: float
    peak_bytes: int
    output: str


def run(command: list[str], cwd: Path) -> Measured:
    """Run a command to its end; one that fails ends the benchmark."""
    began = time.perf_counter()
    log = cwd / ".output"
    with log.open("w+b") as file:
        process = subprocess.Popen(command, cwd=cwd, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        file.seek(0)
        output = file.read().decode(errors="replace")
    if process.returncode:
        raise SystemExit(f"{shlex.join(command[:6])} failed:\n{output[-2000:]}")
    return Measured(seconds, usage.ru_maxrss * 1024, output)


def stdlib_text(n_characters: int) -> str:
    """Return the beginning of the running Python's library as one text."""
    parts: list[str] = []
    for file in (file for files in library_packages().values() for file in files):
        parts.append(file.read_text(encoding="utf-8", errors="ignore"))
        if sum(map(len, parts)) >= n_characters:
            break
    return "".join(parts)[:n_characters]


def prepared(folder: Path, text: Path | None, tokenizer: str) -> Path:
    """Prepare a text, or 1.1 million characters of the library, in `folder`; return the shards."""
    (folder / "text.txt").write_text(text.read_text() if text else stdlib_text(1_100_000))
    data = folder / f"data-{tokenizer}"
    words = ["prepare", "./text.txt", "--out", str(data), "-s", f"tokenizer.name={tokenizer}"]
    run([*GPT, *words], folder)
    return data


def loss_of(weights: Path, data: Path) -> float:
    """Return the loss of a checkpoint, nanoGPT's or ours, on all of the validation tokens."""
    origin = open_pretrained(str(weights))
    model = Network(origin.model)
    load_weights(model, origin.weights(), weights)
    with TokenReader(data, read_manifest(data), "val") as tokens:
        result = evaluate(model, tokens, CPU, context=64)
    assert result is not None
    return result.loss


def as_nanogpt_data(shards: Path, nanogpt: Path, name: str) -> None:
    """Write prepared tokens as nanoGPT reads them: data/<name>/{train,val}.bin and meta.pkl."""
    folder = nanogpt / "data" / name
    folder.mkdir(parents=True, exist_ok=True)
    manifest = read_manifest(shards)
    for split in ("train", "val"):
        with TokenReader(shards, manifest, split) as tokens:
            tokens.read(0, len(tokens)).astype(np.uint16).tofile(folder / f"{split}.bin")
    tokenizer = read_tokenizer(shards, manifest)
    itos = {id: tokenizer.decode([id]) for id in range(tokenizer.vocab_size)}
    meta = {"vocab_size": tokenizer.vocab_size, "itos": itos,
            "stoi": {text: id for id, text in itos.items()}}  # fmt: skip
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def nanogpt_command(**options: object) -> list[str]:
    """Return nanoGPT's command line, which is run in its own folder."""
    return [sys.executable, "train.py", *(f"--{key}={value}" for key, value in options.items())]


class Report:
    """Prints lines as they come, and puts them into their section of RESULTS.md at the end."""

    def __init__(self, title: str) -> None:
        self.title = title + f", as {_stood_in}" * bool(_stood_in)
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        """Print and keep a line."""
        print(text, flush=True)
        self.lines.append(text)

    def save(self) -> None:
        """Write the section, in place of an older one of this title."""
        words = ["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]
        told = [_no_path(word) for word in words]
        head = [f"## {self.title}", "", f"`{shlex.join(told)}`", "", machine(), ""]
        section = "\n".join([*head, "```", *self.lines, "```", ""])
        old = RESULTS.read_text() if RESULTS.exists() else "# Benchmark results\n\n"
        pattern = re.compile(rf"^## {re.escape(self.title)}\n.*?(?=^## |\Z)", re.M | re.S)
        without = pattern.sub("", old).rstrip() + "\n\n"
        RESULTS.write_text(without + section)


def _no_path(word: str) -> str:
    return "DIR" if word.startswith(("/", "~")) else word


def machine() -> str:
    """Return what the figures were measured on, in a line."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        name = f"{os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
        checks = {"bf16": "_is_avx512_bf16_supported", "AMX": "_is_amx_tile_supported"}
        name += "".join(f", {what}" for what, check in checks.items()
                        if getattr(torch.cpu, check, lambda: False)())  # fmt: skip
    return (
        f"{datetime.date.today()}, {platform.machine()}, {name}; Python"
        f" {platform.python_version()}, torch {torch.__version__}, gptcli {__version__}"
    )
