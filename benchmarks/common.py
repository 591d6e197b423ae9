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
import tempfile
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

CPU = Runtime(torch.device("cpu"), torch.float32, compile=False)
RESULTS = Path(__file__).parent / "RESULTS.md"
GPT = [sys.executable, "-m", "gptcli"]


# Classes of processors that a newer one can stand in for, as torch and MKL call their vectors; AMX
# and native limit nothing.
VECTORS = {
    "native": None, "AMX": None, "AVX512_CORE_BF16": "avx512", "AVX512_CORE": "avx512",
    "AVX2": "avx2",
}  # fmt: skip


def add_isa(parser: argparse.ArgumentParser) -> None:
    """Add --isa: the classes of processors as which the measured programs run, in turn."""
    parser.add_argument("--isa", nargs="+", choices=list(VECTORS), default=["native"])


def limited_to(isa: str) -> dict[str, str]:
    """Return the environment in which oneDNN, torch and MKL behave as on this class."""
    if (vectors := VECTORS[isa]) is None:
        return dict(os.environ)
    limits = {"ONEDNN_MAX_CPU_ISA": isa, "ATEN_CPU_CAPABILITY": vectors}
    limits["MKL_ENABLE_INSTRUCTIONS"] = vectors.upper()
    # Code that torch compiled for another class computes NaN here; its cache does not tell.
    limits["TORCHINDUCTOR_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"inductor-{isa}")
    return os.environ | limits


def as_float32(isa: str, classes: list[str]) -> str:
    """Return the first of the classes that computes in float32 as this one does."""
    return next(one for one in classes if (VECTORS[one] == "avx2") == (VECTORS[isa] == "avx2"))


@dataclass(frozen=True)
class Measured:
    """A process that has ended: wall time, its own peak memory, and what it printed."""

    seconds: float
    peak_bytes: int
    output: str


def run(command: list[str], cwd: Path, isa: str = "native") -> Measured:
    """Run a command to its end as on a class of processors; one that fails ends the benchmark."""
    began = time.perf_counter()
    log = cwd / ".output"
    with log.open("w+b") as file:
        process = subprocess.Popen(command, cwd=cwd, env=limited_to(isa), stdout=file,
                                   stderr=subprocess.STDOUT)  # fmt: skip
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
        self.title = title
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
