"""What each choice of a recipe is worth: the example with one choice undone at a time.

    python benchmarks/ablations.py [--example quickstart] [--text FILE] [--seeds 5]
                                   [--minutes 2 | --steps N] [--only WORD]... [--out FOLDER]
    python benchmarks/ablations.py --small-text MINUTES [--text FILE] [--seeds 3]

Equal wall clock: with --minutes, every run settles its own steps for the same time
(`train.max_minutes`), on an otherwise idle machine. With --steps, the example trains for N steps
and a change for as many as take the same time, by the median of five timings taken in turn; only
these need an idle machine. Losses are static bits per byte of 65,536 tokens in windows spread over
the validation text. The change is paired by seed; its interval is Student's, of 95%. With --out,
finished runs are kept and not repeated, so that a stopped table continues.

With `--small-text`, the example of that name is changed.
"""

import argparse
import json
import math
import shutil
import statistics
import tempfile
from itertools import pairwise
from pathlib import Path

from common import GPT, Report, run, stdlib_text

from gptcli.data.shards import read_manifest

# Student's t of 95%, two-sided, by degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

CHANGES = {
    "quickstart": {
        "as it is": [],
        "one rate for all": ["optim.embed_lr=null", "optim.head_lr=null"],
        "embeddings at half the rate": ["optim.embed_lr=0.1"],
        "embeddings at twice the rate": ["optim.embed_lr=0.4"],
        "no pairs": ["model.bigram_rows=0"],
        "half as many rows of pairs": ["model.bigram_rows=8192"],
        "four times the rows of pairs": ["model.bigram_rows=65536"],
        "no value embeddings": ["model.n_value_embd=0"],
        "value embeddings in all blocks": ["model.n_value_embd=4"],
        "no offset keys": ["model.key_offset=false"],
        "embedding only at the bottom": ["model.x0_scalars=false"],
        "none of these": ["model.bigram_rows=0", "model.n_value_embd=0", "model.key_offset=false",
                          "model.x0_scalars=false"],
        "none, and one rate (before)": [
            "model.bigram_rows=0", "model.n_value_embd=0", "model.key_offset=false",
            "model.x0_scalars=false", "optim.embed_lr=null", "optim.head_lr=null",
            "model.zero_init_head=false", "model.block_size=256", "train.micro_batch_size=16"],
        "head not from zero": ["model.zero_init_head=false"],
        "first weights by width": ["model.init_std=width"],
        "context of 256": ["model.block_size=256", "train.micro_batch_size=16"],
        "half the batch": ["train.micro_batch_size=4"],
        "twice the batch": ["train.micro_batch_size=16"],
        "3 blocks": ["model.n_layer=3"],
        "width 320, 5 heads": ["model.n_embd=320", "model.n_head=5"],
        "SwiGLU": ["model.mlp=swiglu"],
        "lr 0.01": ["optim.lr=1e-2"],
        "lr 0.005": ["optim.lr=5e-3"],
    },
    "benchmark-char": {
        "as it is": [],
        "AdamW for the matrices too, at 0.003": ["optim.name=adamw", "optim.momentum=0.95",
                                                 "optim.lr=3e-3"],
        "momentum 0.95": ["optim.momentum=0.95"],
        "cosine instead of linear": ["optim.schedule=cosine"],
        "wsd instead of linear": ["optim.schedule=wsd"],
        "GELU instead of squared ReLU": ["model.mlp=gelu"],
        "squared ReLU instead of SwiGLU": ["model.mlp=relu2"],
        "learned positions": ["model.position=learned"],
        "no QK norm": ["model.qk_norm=false"],
        "rmsnorm instead of layernorm": ["model.norm=rmsnorm"],
        "projections not from zero": ["model.zero_init=false"],
        "one rate for all": ["optim.embed_lr=null", "optim.head_lr=null"],
        "no pairs": ["model.bigram_rows=0"],
        "no value embeddings": ["model.n_value_embd=0"],
        "no offset keys": ["model.key_offset=false"],
        "embedding only at the bottom": ["model.x0_scalars=false"],
        "float32": ["dtype=float32"],
    },
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
    parser.add_argument("--example", choices=CHANGES, default="quickstart")
    parser.add_argument("--text", type=Path, help="another text than the standard library")
    time = parser.add_mutually_exclusive_group()
    time.add_argument("--minutes", type=float, help="wall clock of each run; default: its steps")
    time.add_argument("--steps", type=int, help="steps of the example, which others' time equals")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", action="append", default=[], help="words of the changes to run")
    parser.add_argument("--out", type=Path, help="keep what is finished here")
    parser.add_argument("--small-text", type=float, metavar="MINUTES")
    options = parser.parse_args()
    if options.small_text:
        small_text(options.small_text, options.text, options.seeds)
        return
    what = options.text.name if options.text else "the standard library"
    length = f", {options.minutes:g} minutes each" if options.minutes else ""
    length = f", the time of {options.steps} steps each" if options.steps else length
    report = Report(f"Ablations of {options.example}, on {what}{length}")
    with tempfile.TemporaryDirectory() as name:
        folder = options.out.absolute() if options.out else Path(name)
        folder.mkdir(parents=True, exist_ok=True)
        common = [
            f"data.dir={_prepared(folder, options.example, options.text)}",
            "train.eval_tokens=4096",
            "generate.max_new_tokens=1",
        ]  # scored once it is done
        if options.minutes:
            common += [f"train.max_minutes={options.minutes}", "train.max_steps=null"]
        if options.text:  # whose tokens are not those of the library's prompt
            common += ["data.source=null", "generate.prompt=null"]
        variants = {label: [*common, *changes]
                    for label, changes in CHANGES[options.example].items()
                    if not (changes and options.only)
                    or any(word in label for word in options.only)}  # fmt: skip
        if options.steps:
            _settle_steps(folder, options.example, variants, options.steps)
        found: dict[str, list[tuple[float, int]]] = {label: [] for label in variants}
        for seed in range(1, options.seeds + 1):  # so that a table cut short has pairs
            for label, sets in variants.items():
                run_dir = folder / f"{label}-{seed}".replace(" ", "-")
                found[label].append(_measured(run_dir, options.example, [*sets, f"seed={seed}"]))
        base = [bits for bits, _ in found["as it is"]]
        for label, done in found.items():
            bits, steps = [bits for bits, _ in done], statistics.median(n for _, n in done)
            report.line(f"{label:<38} {statistics.mean(bits):.4f} bits per byte"
                        f"  {_change(bits, base):<22} {steps:5.0f} steps")  # fmt: skip
    report.save()


def _settle_steps(folder: Path, example: str, variants: dict[str, list[str]], steps: int) -> None:
    """Give each variant the steps that take the time of `steps` of the first."""
    kept = folder / "seconds.json"
    seconds: dict[str, list[float]] = {label: [] for label in variants}
    seconds |= json.loads(kept.read_text()) if kept.exists() else {}
    while any(len(seconds[label]) < 5 for label in variants):
        for label, sets in variants.items():
            seconds[label].append(_seconds_a_step(folder / "timing", example, sets))
        kept.write_text(json.dumps(seconds))
    medians = [statistics.median(seconds[label]) for label in variants]
    for sets, median in zip(variants.values(), medians, strict=True):
        n = round(steps * medians[0] / median)
        sets += [f"train.max_steps={n}", "train.max_minutes=null"]


def _seconds_a_step(run_dir: Path, example: str, sets: list[str]) -> float:
    """Train for a few steps, without an evaluation between them, and time them."""
    short = [*sets, f"run_dir={run_dir}", "train.max_steps=16", "train.max_minutes=null",
             "train.eval_every=16", "train.log_every=1", "train.eval_tokens=2048",
             "generate.max_new_tokens=1"]  # fmt: skip
    words = [word for one in short for word in ("-s", one)]
    run([*GPT, "train", "-c", example, *words, "--overwrite"], run_dir.parent)
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    seconds: list[float] = [line["seconds"] for line in lines if "loss" in line]
    shutil.rmtree(run_dir)
    return statistics.median(late - early for early, late in pairwise(seconds[4:]))


def _prepared(folder: Path, example: str, text: Path | None) -> Path:
    """Prepare the example's source, or another text with its tokenizer; return the shards."""
    data = folder / "data"
    source = ["-s", f"data.source={text.absolute()}"] if text else []
    run([*GPT, "prepare", "-c", example, *source, "--out", str(data)], folder)
    return data


def _measured(run_dir: Path, example: str, sets: list[str]) -> tuple[float, int]:
    """Train and score a run unless that is done; return its bits per byte and its steps."""
    kept = run_dir.parent / f"{run_dir.name}.json"
    if not kept.exists():
        words = [word for one in [*sets, f"run_dir={run_dir}"] for word in ("-s", one)]
        run([*GPT, "train", "-c", example, *words, "--overwrite", "--json"], run_dir.parent)
        scored = run([*GPT, "eval", "--checkpoint", str(run_dir / "last.pt"),
                      "--data", str(run_dir.parent / "data"), "--max-tokens", "65536", "--json"],
                     run_dir.parent).output  # fmt: skip
        kept.write_text(scored[scored.index("{") :])
    found = json.JSONDecoder().raw_decode(kept.read_text())[0]
    return found["bits_per_byte"], found["step"]


def _change(found: list[float], base: list[float]) -> str:
    """Return the mean change from the base over paired seeds, and its interval."""
    if found == base:
        return ""
    gaps = [one - other for one, other in zip(found, base, strict=True)]
    mean = statistics.mean(gaps)
    if len(gaps) < 2:
        return f"{mean:+.4f}"
    half = _T[min(len(gaps) - 2, len(_T) - 1)] * statistics.stdev(gaps) / len(gaps) ** 0.5
    return f"{mean:+.4f} +- {half:.4f}" + ("" if abs(mean) > half else " ?")


if __name__ == "__main__":
    main()
