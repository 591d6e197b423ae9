"""What it gains that OpenMP's threads spin while they wait on an idle machine, and else sleep.

    python benchmarks/waiting.py [--rounds 5] [--busy 1]

`gpt train` on a network of 2 layers and 128 channels, characters, not compiled, as whole processes:
with each way of waiting in turn, first alone, then beside processes that use a core each. The rate
is the median over the steps after the first 20. libgomp, which torch's wheels for Linux bring,
spins 300,000 times by default, as good as ACTIVE.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from common import GPT, Report, prepared

WAYS = {
    "as it is": {},
    "ACTIVE": {"OMP_WAIT_POLICY": "ACTIVE"},
    "30,000 spins": {"GOMP_SPINCOUNT": "30000"},
    "PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
}
STEPS, FIRST = 220, 20
SHAPE = ("n_layer=2", "n_head=4", "n_embd=128", "block_size=64")


def rate(data: Path, folder: Path, way: dict[str, str]) -> float:
    """Train a little; return tokens per second."""
    settings = [*(f"model.{value}" for value in SHAPE), f"data.dir={data}", "name=waiting",
                "device=cpu", "compile=false", f"train.max_steps={STEPS}",
                "train.micro_batch_size=12", "train.log_every=1", "train.eval_tokens=64",
                "generate.max_new_tokens=1"]  # fmt: skip
    words = [part for value in settings for part in ("-s", value)]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    subprocess.run(
        [*GPT, "train", *words, "--overwrite"], cwd=folder, env={**env, **way}, check=True,
        capture_output=True,
    )  # fmt: skip
    lines = map(json.loads, (folder / "runs/waiting/metrics.jsonl").read_text().splitlines())
    rates = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    return float(statistics.median(rates[FIRST:]))


@contextlib.contextmanager
def beside(n_busy: int) -> Iterator[None]:
    """Keep `n_busy` cores busy meanwhile."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n_busy)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def main() -> None:
    """Measure, print and write RESULTS.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy", type=int, default=1, help="processes beside it")
    args = parser.parse_args()
    report = Report("Waiting for other threads")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = prepared(folder, None, "char")
        for n_busy in (0, args.busy):
            rates: dict[str, list[float]] = {label: [] for label in WAYS}
            with beside(n_busy):
                for _ in range(args.rounds):
                    for label, way in WAYS.items():
                        rates[label].append(rate(data, folder, way))
            base = statistics.median(rates["ACTIVE"])
            for label, found in rates.items():
                report.line(
                    f"{f'beside {n_busy} busy' if n_busy else 'alone':<14} {label:<14}"
                    f" {statistics.median(found):>8,.0f} tokens/s"
                    f" ({min(found):,.0f} to {max(found):,.0f})"
                    f"   {statistics.median(found) / base:.2f} of ACTIVE"
                )
    report.line(f"load of the machine at the end: {os.getloadavg()[0]:.1f}")
    report.save()


if __name__ == "__main__":
    main()
