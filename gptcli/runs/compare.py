"""Runs in figures, side by side: their settings, and how far each was at the same point."""

import contextlib
import stat
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptcli.formatting import count, duration, loss, perplexity, plural, scored
from gptcli.runs.record import RunHistory

_NAMES = {"name", "run_dir"}  # which always differ


def names_of(runs: Sequence[RunHistory]) -> list[str]:
    """Return the runs' names, or their folders if two have the same name."""
    names = [run.name for run in runs]
    return names if len({*names}) == len(names) else [run.folder.as_posix() for run in runs]


def figures(run: RunHistory) -> dict[str, Any]:
    """Return the figures of a run, by their names in JSON.

    `loss` is that of the newest logged step, train_loss and val_loss are those of the newest
    evaluation, which scores val_tokens of val_split_tokens; tokens_per_second is a median. Hard
    links count once in size_bytes.
    """
    scored = run.evaluations[-1] if run.evaluations else None
    losses = [row.loss for row in run.steps if row.loss is not None]
    speeds = [row.tokens_per_second for row in run.steps if row.tokens_per_second]
    best = run.best_point
    return {
        "name": run.name,
        "folder": run.folder.as_posix(),
        "state": run.state,
        "exit_code": run.status.exit_code,
        "step": run.step,
        "max_steps": run.max_steps,
        "tokens": round(run.tokens_at(run.step)),
        "seconds": run.seconds,
        "loss": losses[-1] if losses else None,
        "train_loss": scored.train_loss if scored else None,
        "val_loss": scored.val_loss if scored else None,
        "val_tokens": run.eval_tokens,
        "val_split_tokens": run.facts.data.tokens.val or None,
        "best_val_loss": run.best.val_loss if run.best else None,
        "best_epoch_loss": run.best_epoch.train_loss if run.best_epoch else None,
        "best_step": best[0] if best else None,
        "parameters": run.facts.parameters,
        "tokens_per_second": statistics.median_high(speeds) if speeds else None,
        "created": run.facts.created,
        "changed": run.status.time or run.facts.created,
        "size_bytes": size_on_disk(run.folder),
    }


def at_a_glance(run: RunHistory) -> list[tuple[str, str, str]]:
    """Return what is known of a run: the name of a figure, the figure, and a remark."""
    last = run.steps[-1] if run.steps else None
    newest = run.evaluations[-1] if run.evaluations else None
    best, epoch = run.best, run.best_epoch
    epochs = run.epochs_at(run.step)
    shown = [("Steps", f"{run.step:,}", f"of {run.max_steps:,}" if run.max_steps else "")]
    if best is not None:
        part = scored(run.eval_tokens, run.facts.data.tokens.val)
        shown.append(("Best validation loss", loss(best.val_loss), f"at step {best.step:,}{part}"))
        shown.append(("Best perplexity", perplexity(best.val_loss), "per token"))
    if epoch is not None:
        shown.append(("Best epoch loss", loss(epoch.train_loss), f"at step {epoch.step:,}"))
    if newest is not None:
        if newest is not best and newest.val_loss is not None:
            shown.append(("Last validation loss", loss(newest.val_loss), ""))
        shown.append(("Last training loss", loss(newest.train_loss), "evaluated"))
    if last is not None:
        passes = plural(epochs, "epoch") if epochs is not None else ""
        shown += [("Last training loss", loss(last.loss), "")] * (newest is None)
        shown += [
            ("Tokens", count(run.tokens_at(run.step)), passes),
            ("Wall time", duration(run.seconds), ""),
            ("Tokens per second", count(last.tokens_per_second), "last logged"),
        ]
    if run.facts.parameters:
        shown.append(("Parameters", count(run.facts.parameters), ""))
    return shown


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


def at_equal_tokens(runs: Sequence[RunHistory]) -> tuple[int, list[float | None]]:
    """Return tokens that all evaluated runs trained on, and each one's newest validation loss then.

    That is the last evaluation of the run that got least far.
    """
    courses = [
        [(run.tokens_at(row.step), row.val_loss) for row in run.evaluations
         if row.val_loss is not None]
        for run in runs
    ]  # fmt: skip
    amount = min((course[-1][0] for course in courses if course), default=0.0)
    losses = [
        next((loss for at, loss in reversed(course) if at <= amount), None) for course in courses
    ]
    return round(amount), losses
