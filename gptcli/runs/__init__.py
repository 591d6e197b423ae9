"""Run folders: written, read, found and compared; no torch, no terminal."""

from gptcli.runs.find import find_checkpoint, find_run, list_runs, next_commands, run_named
from gptcli.runs.read import read_run
from gptcli.runs.record import BEST, CONFIG, LAST, METRICS, RUN, SAMPLES, STATUS, RunHistory

__all__ = [
    "BEST", "CONFIG", "LAST", "METRICS", "RUN", "SAMPLES", "STATUS", "RunHistory",
    "find_checkpoint", "find_run", "list_runs", "next_commands", "read_run", "run_named",
]  # fmt: skip
