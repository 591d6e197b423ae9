"""How long `gpt` takes to say something, beside an empty Python: medians of interleaved runs.

python benchmarks/startup.py [--rounds 5]
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time

from common import Report

COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "gpt --help": ["-m", "gptcli", "--help"],
    "gpt train --help": ["-m", "gptcli", "train", "--help"],
    "gpt train -s typo=1 (an error)": ["-m", "gptcli", "train", "-s", "typo=1"],
}


def main() -> None:
    """Run every command in turn, round after round, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds + 1):
            for name, words in COMMANDS.items():
                began = time.perf_counter()
                subprocess.run([sys.executable, *words], capture_output=True, cwd=folder)
                seconds[name].append(time.perf_counter() - began)
    report = Report("Start-up")
    empty = statistics.median(seconds["python -c pass"][1:])  # the first round warms the caches
    for name, times in seconds.items():
        median = statistics.median(times[1:])
        report.line(f"{name:<32} {median * 1000:6.0f} ms  {median / empty:5.1f} x  an empty Python")
    report.save()


if __name__ == "__main__":
    main()
