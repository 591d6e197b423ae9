"""Runs in figures, side by side: their settings, and how far each was at the same point."""

import contextlib
import math
import stat
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptcli.runs.record import RunHistory

_NAMES = {"name", "run_dir"}  # which always differ


@dataclass(frozen=True)
class Figures:
    """The figures of a run.

    Attributes:
        seconds: Wall time, resumed parts added up.
        loss: Of the newest logged step, nats per token.
        train_loss: Of the newest evaluation, on fixed training windows; so is `val_loss`.
        val_tokens: Validation tokens that each evaluation scores, of `val_split_tokens`.
        best_epoch_loss: Without validation, the lowest mean training loss of an epoch.
        tokens_per_second: Median over the logged steps.
        size_bytes: Disk space of the folder, hard links counted once.
    """

    name: str
    folder: str
    state: str
    exit_code: int | None
    step: int
    max_steps: int | None
    tokens: int
    seconds: float
    loss: float | None
    train_loss: float | None
    val_loss: float | None
    val_tokens: int | None
    val_split_tokens: int | None
    best_val_loss: float | None
    best_epoch_loss: float | None
    best_step: int | None
    parameters: int | None
    tokens_per_second: float | None
    created: str | None
    changed: str | None
    size_bytes: int

    @property
    def perplexity(self) -> float | None:
        """Perplexity per token of the best evaluation."""
        loss = self.best_val_loss
        return math.exp(loss) if loss is not None and loss < 700 else None


def figures(run: RunHistory) -> Figures:
    """Return the figures of a run."""
    scored = run.evaluations[-1] if run.evaluations else None
    losses = [row.loss for row in run.steps if row.loss is not None]
    speeds = [row.tokens_per_second for row in run.steps if row.tokens_per_second]
    best = run.best_point
    return Figures(
        name=run.name,
        folder=run.folder.as_posix(),
        state=run.state,
        exit_code=run.status.exit_code,
        step=run.step,
        max_steps=run.max_steps,
        tokens=round(run.tokens_at(run.step)),
        seconds=run.seconds,
        loss=losses[-1] if losses else None,
        train_loss=scored.train_loss if scored else None,
        val_loss=scored.val_loss if scored else None,
        val_tokens=run.eval_tokens,
        val_split_tokens=run.facts.data.tokens.val or None,
        best_val_loss=run.best.val_loss if run.best else None,
        best_epoch_loss=run.best_epoch.train_loss if run.best_epoch else None,
        best_step=best[0] if best else None,
        parameters=run.facts.parameters,
        tokens_per_second=statistics.median_high(speeds) if speeds else None,
        created=run.facts.created,
        changed=run.status.time or run.facts.created,
        size_bytes=size_on_disk(run.folder),
    )


def size_on_disk(folder: Path) -> int:
    """Return the bytes of a folder's files; best.pt and last.pt are other names of checkpoints."""
    sizes: dict[tuple[int, int], int] = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # training has just removed it
            status = path.lstat()
            if not stat.S_ISDIR(status.st_mode):
                sizes[(status.st_dev, status.st_ino or hash(path))] = status.st_size
    return sum(sizes.values())


def differing_settings(runs: Sequence[RunHistory]) -> dict[str, tuple[object, ...]]:
    """Return the settings that are not the same in all runs, in the order of the first's file."""
    names = dict.fromkeys(key for run in runs for key in run.settings if key not in _NAMES)
    values = {key: tuple(run.settings.get(key) for run in runs) for key in names}
    return {key: row for key, row in values.items() if any(value != row[0] for value in row)}


@dataclass(frozen=True)
class EqualPoint:
    """The newest validation losses the runs had at a point that all of them reached.

    That is the last evaluation of the run that got least far, in steps, tokens or seconds. Each
    loss has the amount at which it was measured; a run without an evaluation has none.
    """

    unit: str
    amount: float
    losses: tuple[tuple[float, float] | None, ...]


def equal_points(runs: Sequence[RunHistory]) -> list[EqualPoint]:
    """Return the losses after equal steps, tokens and seconds of the runs that were evaluated."""
    measures: dict[str, Callable[[RunHistory, int], float]] = {
        "steps": lambda run, step: float(step),
        "tokens": RunHistory.tokens_at,
        "seconds": RunHistory.seconds_at,
    }
    points = []
    for unit, measure in measures.items():
        courses = [
            [(row.val_loss, measure(run, row.step)) for row in run.evaluations
             if row.val_loss is not None]
            for run in runs
        ]  # fmt: skip
        reached = [course[-1][1] for course in courses if course]
        if len(reached) > 1:
            amount = min(reached)
            last = ([one for one in course if one[1] <= amount][-1:] for course in courses)
            points.append(EqualPoint(unit, amount, tuple(one[0] if one else None for one in last)))
    return points
