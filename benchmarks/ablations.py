"""What each choice of the recipe is worth: benchmark-char with one choice undone at a time.

    python benchmarks/ablations.py [--text FILE] [--seeds 3]

Losses are means over seeds, on all of the validation text, after the same number of steps.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

from common import GPT, Report, loss_of, prepared, run

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


def main() -> None:
    """Train every variant with every seed and write the section."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
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
