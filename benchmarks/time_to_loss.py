"""How soon `gpt train -c benchmark-char` is at the loss that nanoGPT's CPU recipe ends with.

    python benchmarks/time_to_loss.py --nanogpt DIR [--text FILE] [--rounds 5]

The text is Python's standard library cut to 1.1 million characters, or any other. nanoGPT trains
as its README says for a CPU (2,000 steps); `gpt train` runs its example with another seed each
round. Times are those of whole processes, from their start to their end, in turn. Both networks
are scored by us on all of the validation text, in windows of 64.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from common import (
    GPT,
    Report,
    as_nanogpt_data,
    loss_of,
    nanogpt_command,
    parse_with_isa,
    prepared,
    run,
)


def main() -> None:
    """Run both in turn and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, help="folder of nanoGPT's train.py")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parse_with_isa(parser)
    what = options.text.name if options.text else "the standard library"
    report = Report(f"Time to nanoGPT's loss, on {what}")
    theirs: list[tuple[float, float]] = []
    ours: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = prepared(folder, options.text, "char")
        for seed in range(1, options.rounds + 1):
            if options.nanogpt is not None:
                as_nanogpt_data(data, options.nanogpt, "bench-char")
                command = nanogpt_command(
                    dataset="bench-char", device="cpu", compile=False, eval_iters=20,
                    eval_interval=250, log_interval=100, block_size=64, batch_size=12,
                    gradient_accumulation_steps=1, n_layer=4, n_head=4, n_embd=128,
                    max_iters=2000, lr_decay_iters=2000, dropout=0.0, learning_rate=1e-3,
                    min_lr=1e-4, beta2=0.99, warmup_iters=100, out_dir="out-bench",
                )  # fmt: skip
                done = run(command, options.nanogpt)
                loss = loss_of(options.nanogpt / "out-bench" / "ckpt.pt", data)
                theirs.append((done.seconds, loss))
                report.line(
                    f"nanoGPT, 2,000 steps          {done.seconds:6.1f} s   loss {loss:.4f}"
                )
            run_dir = folder / f"run-{seed}"
            done = run([*GPT, "train", "-c", "benchmark-char", "-s", f"data.dir={data}",
                        "-s", f"seed={seed}", "-s", f"run_dir={run_dir}"], folder)  # fmt: skip
            loss = loss_of(run_dir / "last.pt", data)
            ours.append((done.seconds, loss))
            report.line(
                f"gpt train, seed {seed}              {done.seconds:6.1f} s   loss {loss:.4f}"
            )
    median = statistics.median(seconds for seconds, _ in ours)
    if not theirs:
        report.line("nanoGPT was left out: name its folder with --nanogpt DIR")
    else:
        ratio = statistics.median(seconds for seconds, _ in theirs) / median
        goal = statistics.median(loss for _, loss in theirs)
        below = sum(loss <= goal for _, loss in ours)
        report.line(f"{ratio:.1f} times as fast; {below} of {len(ours)} seeds end below {goal:.4f}")
    report.save()


if __name__ == "__main__":
    main()
