"""How soon `gpt train -c benchmark-char` is at the loss that nanoGPT's CPU recipe ends with.

    python benchmarks/time_to_loss.py --nanogpt DIR [--text FILE] [--isa CLASS...] [--rounds 5]

The text is Python's standard library cut to 1.1 million characters, or any other. nanoGPT trains
as its README says for a CPU (2,000 steps); `gpt train` runs its example with another seed each
round. Times are those of whole processes, in turn, from their start to their end, and until the
checkpoint that is scored was complete: ours then samples and draws its curves. Both networks are
scored by us on all of the validation text, in windows of 64. With --isa both run as on older
classes of processors, nanoGPT once for all that compute in float32 alike.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from common import (
    GPT,
    Report,
    add_isa,
    as_float32,
    as_nanogpt_data,
    loss_of,
    nanogpt_command,
    prepared,
    run,
)

Ended = tuple[float, float, float]  # seconds, loss, seconds until its checkpoint was there


def main() -> None:
    """Run both in turn and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, help="folder of nanoGPT's train.py")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    add_isa(parser)
    options = parser.parse_args()
    what = options.text.name if options.text else "the standard library"
    report = Report(f"Time to nanoGPT's loss, on {what}")
    if options.nanogpt is None:
        report.line("nanoGPT was left out: name its folder with --nanogpt DIR")
    theirs: dict[str, list[Ended]] = {}
    ours: dict[str, list[Ended]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = prepared(folder, options.text, "char")
        for seed in range(1, options.rounds + 1):
            for isa in options.isa:
                if options.nanogpt is not None and isa == as_float32(isa, options.isa):
                    ended = nanogpt(options.nanogpt, data, isa)
                    theirs.setdefault(isa, []).append(ended)
                    report.line(told(f"nanoGPT, 2,000 steps, {isa}", ended))
                ended = trained(folder / f"run-{seed}-{isa}", data, seed, isa)
                ours.setdefault(isa, []).append(ended)
                report.line(told(f"gpt train, seed {seed}, {isa}", ended))
    for isa, runs in ours.items():
        if beside := theirs.get(as_float32(isa, options.isa)):
            goal = statistics.median(loss for _, loss, _ in beside)
            whole, saved = (
                statistics.median(one[at] for one in beside)
                / statistics.median(one[at] for one in runs)
                for at in (0, 2)
            )
            below = sum(loss <= goal for _, loss, _ in runs)
            report.line(
                f"{isa}: {whole:.1f} times as fast to the end, {saved:.1f} to the checkpoint;"
                f" {below} of {len(runs)} seeds end below {goal:.4f}"
            )
    report.save()


def told(who: str, ended: Ended) -> str:
    """Return a run as a line."""
    return f"{who:<42} {ended[0]:6.1f} s   loss {ended[1]:.4f}   checkpoint {ended[2]:6.1f} s"


def scored(checkpoint: Path, seconds: float, ended: float, data: Path) -> Ended:
    """Return how a run that took so long, until the time `ended`, is to be told."""
    saved = checkpoint.stat().st_mtime - ended + seconds
    return seconds, loss_of(checkpoint, data), saved


def nanogpt(folder: Path, data: Path, isa: str) -> Ended:
    """Train with nanoGPT's recipe for a CPU."""
    as_nanogpt_data(data, folder, "bench-char")
    command = nanogpt_command(
        dataset="bench-char", device="cpu", compile=False, eval_iters=20,
        eval_interval=250, log_interval=100, block_size=64, batch_size=12,
        gradient_accumulation_steps=1, n_layer=4, n_head=4, n_embd=128,
        max_iters=2000, lr_decay_iters=2000, dropout=0.0, learning_rate=1e-3,
        min_lr=1e-4, beta2=0.99, warmup_iters=100, out_dir="out-bench",
    )  # fmt: skip
    done = run(command, folder, isa)
    return scored(folder / "out-bench" / "ckpt.pt", done.seconds, time.time(), data)


def trained(run_dir: Path, data: Path, seed: int, isa: str) -> Ended:
    """Train with `gpt train -c benchmark-char`."""
    command = [*GPT, "train", "-c", "benchmark-char", "-s", f"data.dir={data}",
               "-s", f"seed={seed}", "-s", f"run_dir={run_dir}"]  # fmt: skip
    done = run(command, run_dir.parent, isa)
    return scored(run_dir / "last.pt", done.seconds, time.time(), data)


if __name__ == "__main__":
    main()
