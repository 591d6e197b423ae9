"""Run folders, found and read: settings, progress, evaluations, samples; no torch, no terminal."""

from gptcli.history.facts import (
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
from gptcli.history.finding import RUNS, find_run, list_runs, next_commands
from gptcli.history.reading import (
    CONFIG,
    LOG,
    METRICS,
    RUN,
    SAMPLES,
    STATUS,
    flatten,
    metrics_row,
    read_rows,
    read_run,
)

__all__ = [
    "CONFIG",
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
    "find_run",
    "flatten",
    "list_runs",
    "metrics_row",
    "next_commands",
    "read_rows",
    "read_run",
]
