"""The names of a run's files, each declared once; a folder that holds RUN holds a run."""

from pathlib import Path

RUNS = Path("runs")
RUN, STATUS, METRICS, SAMPLES, CONFIG, LOG = (
    "run.json", "status.json", "metrics.jsonl", "samples.jsonl", "config.yaml", "log.txt"
)  # fmt: skip
BEST, LAST = "best.pt", "last.pt"
