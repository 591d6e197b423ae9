"""Run folders: written, read, found and compared; no torch, no terminal."""

from gptcli.runs.read import read_run
from gptcli.runs.record import BEST, CONFIG, LAST, METRICS, RUN, SAMPLES, STATUS, RunHistory

__all__ = [
    "BEST", "CONFIG", "LAST", "METRICS", "RUN", "SAMPLES", "STATUS", "RunHistory",
    "read_run",
]  # fmt: skip
