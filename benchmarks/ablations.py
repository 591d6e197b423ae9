"""What each choice of the recipe is worth: benchmark-char with one choice undone at a time.

    python benchmarks/ablations.py [--text FILE] [--seeds 3]
    python benchmarks/ablations.py --small-text MINUTES [--text FILE] [--seeds 3]

Losses are means over seeds, on all of the validation text, after the same number of steps. With
`--small-text`, the example of that name is changed, and each run takes the same time.
"""

import argparse
import json
import math
import statistics
import tempfile
from pathlib import Path

from common import GPT, Report, loss_of, prepared, run, stdlib_text

from gptcli.data.shards import read_manifest

CHANGES = {
    "as it is": [],
    "AdamW for the matrices too, at 0.003": ["optim.name=adamw", "optim.momentum=0.95",
                                             "optim.lr=3e-3"],
    "momentum 0.95": ["optim.momentum=0.95"],
    "cosine instead of linear": ["optim.schedule=cosine"],
    "wsd instead of linear": ["optim.schedule=wsd"],
    "GELU instead of squared ReLU": ["model.mlp=gelu"],
    "SwiGLU instead of squared ReLU": ["model.mlp=swiglu"],
    "learned positions": ["model.position=learned"],
    "no QK norm": ["model.qk_norm=false"],
    "rmsnorm instead of layernorm": ["model.norm=rmsnorm"],
    "tied head": ["model.tie_embeddings=true"],
    "projections not from zero": ["model.zero_init=false"],
    "4 blocks of 128 instead of 2 of 176": ["model.n_layer=4", "model.n_embd=128",
                                            "model.n_inner=480"],
    "float32": ["dtype=float32"],
}  # fmt: skip

SMALL_TEXT = {
    "as it is": [],
    "no dropout": ["model.dropout=0"],
    "no average": ["train.ema=null"],
    "no dropout, no average": ["model.dropout=0", "train.ema=null"],
    "dropout 0.1": ["model.dropout=0.1"],
    "average over 20 steps": ["train.ema=0.95"],
    "no weight decay": ["optim.weight_decay=0"],
    "weight decay 0.5": ["optim.weight_decay=0.5"],
    "4 blocks of 256": ["model.n_layer=4", "model.n_head=4", "model.n_embd=256"],
    "2 blocks of 128": ["model.n_layer=2", "model.n_head=2", "model.n_embd=128"],
}  # fmt: skip


def small_text(minutes: float, text: Path | None, seeds: int) -> None:
    """Train every variant of small-text for the same time and write the section."""
    what = text.name if text else "1.1 MB of the standard library"
    report = Report(f"Ablations of small-text, {minutes:g} minutes each, on {what}")
    with tempfile.TemporaryDirectory() as name:
        folder, base = Path(name), 0.0
        (folder / "text.txt").write_text(text.read_text() if text else stdlib_text(1_100_000))
        for label, changes in SMALL_TEXT.items():
            bits, best, last = [], [], ""
            for seed in range(1, seeds + 1):
                sets = ["data.source=./text.txt", "data.dir=data", f"seed={seed}",
                        f"name={label}-{seed}".replace(" ", "-"), f"train.max_minutes={minutes}",
                        "train.max_epochs=null", "train.stop_after=null", "train.eval_every=50",
                        "generate.max_new_tokens=1", *changes]  # fmt: skip
                words = [word for one in sets for word in ("-s", one)]
                output = run([*GPT, "train", "-c", "small-text", "--json", *words], folder).output
                done = json.loads(output.splitlines()[-1])
                held_out = read_manifest(folder / "data")
                tokens_per_byte = held_out.tokens.val / held_out.bytes.val
                bits.append(done["val_loss"] / math.log(2) * tokens_per_byte)
                best.append(done["best_val_loss"] / math.log(2) * tokens_per_byte)
                last = f"{done['step']:5,} steps, {done['seconds']:5.1f} s"
            mean = statistics.mean(bits)
            base = base or mean
            report.line(f"{label:<24} {mean:.3f} bits/byte at the end {mean - base:+.3f}, best"
                        f" {statistics.mean(best):.3f}   {last}")  # fmt: skip
    report.save()


def main() -> None:
    """Train every variant with every seed and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--small-text", type=float, metavar="MINUTES")
    options = parser.parse_args()
    if options.small_text:
        small_text(options.small_text, options.text, options.seeds)
        return
    what = options.text.name if options.text else "the standard library"
    report = Report(f"Ablations of benchmark-char, on {what}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = prepared(folder, options.text, "char")
        base = 0.0
        for label, changes in CHANGES.items():
            losses, times = [], []
            for seed in range(1, options.seeds + 1):
                run_dir = folder / f"{label}-{seed}".replace(" ", "-")
                sets = [f"data.dir={data}", f"seed={seed}", f"run_dir={run_dir}", *changes]
                done = run([*GPT, "train", "-c", "benchmark-char",
                            *(word for one in sets for word in ("-s", one))], folder)  # fmt: skip
                losses.append(loss_of(run_dir / "last.pt", data))
                times.append(done.seconds)
            loss = statistics.mean(losses)
            base = base or loss
            report.line(f"{label:<38} loss {loss:.4f}  {loss - base:+.4f}"
                        f"   {statistics.median(times):5.1f} s")  # fmt: skip
    report.save()


if __name__ == "__main__":
    main()
