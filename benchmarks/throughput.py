"""Tokens per second and peak memory of `gpt train` beside nanoGPT's script, at several sizes.

    python benchmarks/throughput.py --nanogpt DIR [--sizes empty few 0.8M 11M 124M] [--isa CLASS...]

Both train nanoGPT's own network with AdamW on the same tokens and batches, as whole processes, in
turn. nanoGPT runs as its README says for a CPU (float32, no compiler); `gpt train` runs as it
does by itself. The rate is the median over steps after the first three: no start, no compiling.
With --isa both run as on older classes of processors, in turn; nanoGPT once for all classes of
equal vectors, for float32 knows no other difference.
On a GPU, gpu.py measures both.
"""

import argparse
import json
import re
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from common import (
    GPT,
    Measured,
    Report,
    add_isa,
    as_float32,
    as_nanogpt_data,
    nanogpt_command,
    prepared,
    run,
)


@dataclass(frozen=True)
class Size:
    """A network, its batch, and the steps of the two programs.

    Those of `gpt train` are as many as make a run long enough for it to choose threads and compile.
    """

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    rows: int
    steps: tuple[int, int]  # nanoGPT's, ours
    tokenizer: str


# The first two are measured only if they are named: steps of 0.8M with tensors of next to nothing,
# which show what Python and torch take around a step's products, and with few tokens.
SIZES = {
    "empty": Size(4, 4, 16, 16, 1, (200, 1200), "char"),
    "few": Size(4, 4, 128, 16, 1, (200, 1200), "char"),
    "0.8M": Size(4, 4, 128, 64, 12, (200, 1200), "char"),
    "11M": Size(6, 6, 384, 256, 16, (20, 20), "char"),
    "124M": Size(12, 12, 768, 512, 4, (8, 8), "gpt2"),
}
FIRST = 3  # steps that are not counted


def nanogpt(size: Size, folder: Path, data: str, isa: str) -> tuple[float, Measured]:
    """Train with nanoGPT's script; return tokens per second and the process."""
    command = nanogpt_command(
        dataset=data, device="cpu", compile=False, eval_interval=10**6,
        eval_iters=1, log_interval=1, block_size=size.block_size, batch_size=size.rows,
        gradient_accumulation_steps=1, n_layer=size.n_layer, n_head=size.n_head,
        n_embd=size.n_embd, max_iters=size.steps[0], always_save_checkpoint=False,
        out_dir="out-bench",
    )  # fmt: skip
    done = run(command, folder, isa)
    times = [float(ms) for ms in re.findall(r"^iter \d+: loss .*? time ([\d.]+)ms", done.output,
                                            re.MULTILINE)]  # fmt: skip
    milliseconds = statistics.median(times[FIRST:])
    return size.rows * size.block_size / milliseconds * 1000, done


def ours(
    size: Size, folder: Path, data: Path, sets: tuple[str, ...], isa: str
) -> tuple[float, Measured]:
    """Train with `gpt train`; return tokens per second and the process."""
    settings = [
        f"data.dir={data}", "device=cpu", f"run_dir={folder / 'run'}",
        f"model.n_layer={size.n_layer}", f"model.n_head={size.n_head}",
        f"model.n_embd={size.n_embd}", f"model.block_size={size.block_size}", "model.bias=false",
        "model.mlp=gelu_erf", f"train.micro_batch_size={size.rows}",
        f"train.max_steps={size.steps[1]}", "train.eval_every=1000000", "train.save_every=1000000",
        "train.log_every=1", f"train.eval_tokens={size.block_size}",
        "generate.max_new_tokens=1", "optim.warmup_steps=2000", *sets,
    ]  # fmt: skip
    words = [word for setting in settings for word in ("-s", setting)]
    done = run([*GPT, "train", *words], folder, isa)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line).get("tokens_per_second") for line in lines]
    for path in sorted((folder / "run").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    return statistics.median([rate for rate in rates if rate][FIRST:]), done


def main() -> None:
    """Measure every size and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, help="folder of nanoGPT's train.py")
    parser.add_argument("--sizes", nargs="+", default=["0.8M", "11M", "124M"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-s", "--set", nargs="*", default=[], help="settings for gpt train")
    add_isa(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for label in [label for label in options.sizes if label in SIZES]:
            size = SIZES[label]
            report = Report(f"Training throughput, {label} on cpu")
            if options.nanogpt is None:
                report.line("nanoGPT was left out: name its folder with --nanogpt DIR")
            data = folder / f"data-{size.tokenizer}"
            if not data.exists():
                prepared(folder, None, size.tokenizer)
            measured: dict[tuple[str, str], list[tuple[float, Measured]]] = {}
            for _ in range(options.rounds):
                for isa in options.isa:
                    if options.nanogpt is not None and isa == as_float32(isa, options.isa):
                        as_nanogpt_data(data, options.nanogpt, data.name)
                        theirs = nanogpt(size, options.nanogpt, data.name, isa)
                        measured.setdefault(("nanoGPT", isa), []).append(theirs)
                    one = ours(size, folder, data, tuple(options.set), isa)
                    measured.setdefault(("gpt train", isa), []).append(one)
            tell(report, label, size, measured)
            report.save()


def tell(
    report: Report,
    label: str,
    size: Size,
    measured: dict[tuple[str, str], list[tuple[float, Measured]]],
) -> None:
    """Report one size: medians, spread and ratios."""
    medians = {}
    classes = [isa for name, isa in measured if name == "gpt train"]
    for (name, isa), runs in measured.items():
        rates = [rate for rate, _ in runs]
        rate = statistics.median(rates)
        peak = statistics.median(done.peak_bytes for _, done in runs)
        medians[name, isa] = rate, peak
        line = f"{label:>5}, {size.rows} x {size.block_size} tokens, {name:<9} {isa:<16}"
        line += f" {rate:9,.0f} tokens/s ({min(rates):,.0f} to {max(rates):,.0f})"
        line += f"   {1e3 * size.rows * size.block_size / rate:,.1f} ms a step"
        line += f"   peak {peak / 1e6:,.0f} MB"
        theirs = medians.get(("nanoGPT", as_float32(isa, classes)))
        if name == "gpt train" and theirs:
            line += f"   {rate / theirs[0]:.2f} x the tokens/s, {peak / theirs[1]:.2f} x the memory"
        report.line(line)


if __name__ == "__main__":
    main()
