"""Decoding speed of GPT-2 124M with random weights beside other programs: medians, interleaved.

python benchmarks/generate.py [--isa CLASS...] [--llama PYTHON] [--nanogpt DIR] [--rounds 5]

A 16-token prompt, 200 tokens, this machine's threads. transformers is a package of the tests;
PYTHON is an interpreter that has llama-cpp-python. Whoever is not named is left out, said aloud.
With --isa everybody runs as on older classes of processors, in turn: torch, oneDNN and MKL are
limited, and llama.cpp, built with GGML_BACKEND_DL and GGML_CPU_ALL_VARIANTS, loads its variant.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from common import GPT, Report, add_isa, limited_to, prepared, run

FIRST = "gpt, one token from process start"
N_TOKENS = 200
PROMPT = " a b c d e f g h i j k l m n o p"  # 16 tokens of GPT-2's vocabulary
PEERS = Path(__file__).parent / "peers"
Speeds = dict[str, Callable[[str], float]]  # as a class of processors
# llama.cpp's variant for each class of processors.
VARIANTS = {
    "AMX": ["sapphirerapids"], "AVX512_CORE_BF16": ["cooperlake"], "AVX512_CORE": ["skylakex"],
    "AVX2": ["haswell"],
}  # fmt: skip


def main() -> None:
    """Make the network, measure everybody in turn, and print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--llama", metavar="PYTHON")
    parser.add_argument("--nanogpt", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    add_isa(parser)
    options = parser.parse_args()
    report = Report("Decoding, 124M")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_network(folder)
        speeds = ours(folder) | with_transformers(folder)
        if options.llama:
            speeds |= with_llama(folder, options.llama)
        else:
            report.line("llama.cpp was left out: name its interpreter with --llama PYTHON")
        if options.nanogpt:
            speeds |= with_nanogpt(folder, options.nanogpt)
        else:
            report.line("nanoGPT was left out: name its folder with --nanogpt DIR")
        found: dict[str, dict[str, list[float]]] = {}
        for _ in range(options.rounds):
            for isa in options.isa:
                for label, measure in speeds.items():
                    values = found.setdefault(isa, {}).setdefault(label, [])
                    values.append(measure(isa))
                    print(f"{isa}, {label}: {values[-1]:.1f}", flush=True)
    for isa, of_class in found.items():
        tell(report, isa, of_class)
    report.save()


def make_network(folder: Path) -> None:
    """Write a run with random weights, and the same network for the others.

    It is trained on all its positions, or decoding would keep to those that it was trained on.
    """
    data = prepared(folder, None, "gpt2")
    settings = ["name=random", f"data.dir={data}", "train.max_steps=1", "train.micro_batch_size=1",
                "train.eval_tokens=1024", "optim.lr=1e-9",
                "train.sample_every=null"]  # fmt: skip
    run([*GPT, "train", *(word for one in settings for word in ("-s", one))], folder)
    run([*GPT, "export", "--checkpoint", "random", "--to", "hf", "hf"], folder)


def ours(folder: Path) -> Speeds:
    """Return how to measure `gpt generate`."""

    def measure(*words: str) -> Callable[[str], float]:
        command = [*GPT, "generate", "--checkpoint", "random", "--json", "--top-k", "50",
                   "--max-new-tokens", str(N_TOKENS + 1), *words, PROMPT]  # fmt: skip
        return lambda isa: float(json.loads(printed(command, folder, isa))["tokens_per_second"])

    eight = ("--num-samples", "8")
    return {
        "gpt float32": measure("-s", "dtype=float32"),
        "gpt 16 bit": measure(),
        "gpt int8": measure("--quantize", "int8"),
        "gpt float32, 8 texts": measure("-s", "dtype=float32", *eight),
        "gpt 16 bit, 8 texts": measure(*eight),
        "gpt int8, 8 texts": measure("--quantize", "int8", *eight),
        FIRST: lambda isa: seconds_to_first_token(folder, isa),
    }


def with_transformers(folder: Path) -> Speeds:
    """Return how to measure the transformers library."""

    def measure(dtype: str) -> Callable[[str], float]:
        script = str(PEERS / "transformers_generate.py")
        command = [sys.executable, script, "hf", dtype, "1", str(N_TOKENS)]
        return lambda isa: float(printed(command, folder, isa))

    return {f"transformers {dtype}": measure(dtype) for dtype in ("float32", "bfloat16")}


def with_llama(folder: Path, python: str) -> Speeds:
    """Return how to measure llama.cpp."""

    def measure(dtype: str) -> Callable[[str], float]:
        file = f"{dtype}.gguf"
        run([*GPT, "export", "--checkpoint", "random", "--to", "gguf", "--dtype", dtype, file],
            folder)  # fmt: skip
        script = str(PEERS / "llama_generate.py")
        command = [python, script, file, str(N_TOKENS)]
        return lambda isa: float(printed([*command, *VARIANTS.get(isa, ())], folder, isa))

    return {f"llama.cpp {dtype}": measure(dtype) for dtype in ("float32", "float16", "q8_0")}


def with_nanogpt(folder: Path, where: Path) -> Speeds:
    """Return how to measure nanoGPT, which slows down as the text grows: half the tokens."""
    run([*GPT, "export", "--checkpoint", "random", "--to", "nanogpt", "ckpt.pt"], folder)
    script, n_tokens = str(PEERS / "nanogpt_generate.py"), str(N_TOKENS // 2)
    command = [sys.executable, script, str(where.resolve()), "ckpt.pt", n_tokens]
    return {"nanoGPT float32": lambda isa: float(printed(command, folder, isa))}


def printed(command: list[str], folder: Path, isa: str) -> str:
    """Run a command as on a class of processors and return its last line on stdout."""
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True,
                          stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                          env=limited_to(isa))  # fmt: skip
    return done.stdout.splitlines()[-1]


def seconds_to_first_token(folder: Path, isa: str) -> float:
    """Return the seconds from the start of the process to its end after one token."""
    command = [*GPT, "generate", "--checkpoint", "random", "--max-new-tokens", "1", PROMPT]
    return run(command, folder, isa).seconds


def tell(report: Report, isa: str, found: dict[str, list[float]]) -> None:
    """Print a class's medians with their spread, and the ratios that matter."""
    middle = {label: statistics.median(values) for label, values in found.items()}
    report.line(isa)
    for label, values in found.items():
        unit, digits = ("s", 2) if label == FIRST else ("tokens/s", 1)
        spread = f"({min(values):.{digits}f} to {max(values):.{digits}f})"
        report.line(f"  {label:<35} {middle[label]:7.{digits}f} {unit}  {spread}")
    pairs = [
        ("gpt float32", "transformers float32"), ("gpt 16 bit", "transformers bfloat16"),
        ("gpt float32", "llama.cpp float32"), ("gpt 16 bit", "llama.cpp float16"),
        ("gpt int8", "llama.cpp q8_0"), ("gpt float32", "nanoGPT float32"),
        ("gpt float32, 8 texts", "gpt float32"), ("gpt 16 bit, 8 texts", "gpt 16 bit"),
        ("gpt int8, 8 texts", "gpt int8"),
    ]  # fmt: skip
    for one, other in pairs:
        if one in middle and other in middle:
            report.line(f"  {one} / {other}: {middle[one] / middle[other]:.2f}")


if __name__ == "__main__":
    main()
