"""What is said when a run has ended: its figures, its files, and what to do next."""

import shlex
from pathlib import Path

from gptcli.formatting import duration, loss, perplexity, plural, scored, size
from gptcli.runs import BEST, LAST, METRICS, SAMPLES, next_commands
from gptcli.terminal import console
from gptcli.training.events import Finished, Stopped

_FILES = {
    BEST: "the best weights",
    LAST: "the newest state",
    "base.pt": "the weights that adapters belong to",
    "loss.pdf": "the curves",
    METRICS: "every logged step",
    SAMPLES: "every sample",
}


def summary_text(event: Stopped | Finished) -> str:
    """Return the result of `gpt train`: how long, which losses, what they mean."""
    summary = event.summary
    lines = [
        f"{summary.run_dir}: {plural(summary.step, 'step')}, {plural(summary.tokens, 'token')},"
        f" {duration(summary.seconds)}"
    ]
    losses = {
        "train_loss": summary.train_loss,
        "val_loss": summary.val_loss,
        "best_val_loss": summary.best_val_loss,
    }
    part = {"val_loss": scored(summary.val_tokens, summary.val_split_tokens)}
    shown = [f"{name} {loss(value)}{part.get(name, '')}"
             for name, value in losses.items() if value is not None]  # fmt: skip
    lines += ["  ".join(shown)] if shown else []
    best = summary.best_val_loss
    if best is not None:
        at = f" at step {event.best_step:,}" if event.best_step is not None else ""
        lines.append(f"perplexity {perplexity(best)} per token, best{at}")
    elif event.best_step is not None:
        mean = f": mean training loss {loss(summary.best_epoch_loss)}"
        known = summary.best_epoch_loss is not None
        lines.append(f"best epoch ended at step {event.best_step:,}" + mean * known)
    return "\n".join(lines)


def say_next(event: Stopped | Finished, resume_command: str) -> None:
    """Name the files of the run and the commands that go on from here, on stderr.

    Args:
        event: The last of the run.
        resume_command: What takes it up again.
    """
    folder = Path(event.summary.run_dir)
    sizes = [(name, (folder / name).stat().st_size) for name in _FILES if (folder / name).is_file()]
    if sizes:
        console.message(f"files in {folder}:")
    for name, n_bytes in sizes:
        console.message(f"  {name:<14} {size(n_bytes):>9}  {_FILES[name]}")
    if isinstance(event, Stopped):
        console.message(f"resume with: {resume_command}")
        return
    if not event.spent:
        more_steps = f"-s train.max_steps={2 * event.step}"
        console.message(f"all steps are done; to train longer: {resume_command} {more_steps}")
    if event.summary.checkpoint:
        is_validated = event.summary.best_val_loss is not None
        first, *more = next_commands(event.summary.checkpoint, is_validated=is_validated)
        console.message(f"next: {first}")
        for command in (*more, shlex.join(["gpt", "report", folder.as_posix()])):
            console.message(f"      {command}", "dim")
