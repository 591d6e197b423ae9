"""Two processes of one thread beside one of two threads: tokens a second of a network of 30M.

Both train on the same steps; rounds are interleaved, medians are compared. On a machine of two
cores this is what several processes cost, for there is nothing that they could gain.

    python benchmarks/parallel.py [--rounds 5]
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

from common import GPT, Report, prepared, run

SHAPE = ("model.n_layer=8", "model.n_head=8", "model.n_embd=512", "model.block_size=256",
         "model.vocab_size=8192", "model.bias=false")  # fmt: skip
STEPS = ("train.max_steps=4", "train.micro_batch_size=8", "train.tokens_per_step=16384",
         "train.log_every=1", "train.eval_every=1000", "train.eval_tokens=256",
         "compile=false", "device=cpu", "generate.max_new_tokens=1")  # fmt: skip
WAYS = {
    "1 process, 2 threads": (2, []),
    "2 processes (ddp), 1 thread each": (1, ["--gpus", "2"]),
    "2 processes (fsdp), 1 thread each": (1, ["--gpus", "2", "-s", "train.parallel=fsdp"]),
}


def main() -> None:
    """Train in every way in turn, round after round, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = prepared(folder, None, "bytes")
        for turn in range(rounds):
            for number, (way, (threads, how)) in enumerate(WAYS.items()):
                rates[way].append(_rate(folder, data, f"r{turn}-{number}", threads, how))
    report = Report("Several processes")
    alone = statistics.median(rates[next(iter(WAYS))])
    for way, found in rates.items():
        median = statistics.median(found)
        report.line(f"{way:<36} {median:8,.0f} tokens/s  {median / alone:5.2f} x  one process")
    report.save()


def _rate(folder: Path, data: Path, name: str, threads: int, how: list[str]) -> float:
    """Return the tokens a second of a short run, its first steps left out."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    words = [word for one in (*SHAPE, *STEPS, f"data.dir={data}", f"name={name}")
             for word in ("-s", one)]  # fmt: skip
    run([*GPT, "train", *words, *how], folder)
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines if "tokens_per_second" in line]
    return float(statistics.median(step["tokens_per_second"] for step in steps[1:]))


if __name__ == "__main__":
    main()
