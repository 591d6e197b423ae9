"""Run folders, found and read: settings, progress, evaluations, samples; no torch, no terminal."""

from gptcli.runs.files import BEST, CONFIG, LAST, LOG, METRICS, RUN, RUNS, SAMPLES, STATUS
from gptcli.runs.find import find_checkpoint, find_run, list_runs, next_commands, run_named
from gptcli.runs.read import (
    flatten,
    metrics_row,
    read_rows,
    read_run,
)
from gptcli.runs.record import (
    CheckpointFile,
    Counts,
    DataFacts,
    Epoch,
    Evaluation,
    RunFacts,
    RunHistory,
    Status,
    Step,
    TextSample,
)

__all__ = [
    "BEST",
    "CONFIG",
    "LAST",
    "LOG",
    "METRICS",
    "RUN",
    "RUNS",
    "SAMPLES",
    "STATUS",
    "CheckpointFile",
    "Counts",
    "DataFacts",
    "Epoch",
    "Evaluation",
    "RunFacts",
    "RunHistory",
    "Status",
    "Step",
    "TextSample",
    "find_checkpoint",
    "find_run",
    "flatten",
    "list_runs",
    "metrics_row",
    "next_commands",
    "read_rows",
    "read_run",
    "run_named",
]
