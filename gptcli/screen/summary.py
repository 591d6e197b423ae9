"""What is said when a run has ended: its figures, its files, and what to do next."""

import math
from pathlib import Path

from gptcli import console
from gptcli.training.events import Finished, Stopped

_FILES = {
    "best.pt": "the best weights",
    "last.pt": "the newest state",
    "base.pt": "the weights that adapters belong to",
    "loss.pdf": "the curves",
    "metrics.jsonl": "every logged step",
    "samples.jsonl": "every sample",
}


def summary_text(event: Stopped | Finished) -> str:
    """Return the result of `gpt train`: how long, which losses, what they mean."""
    summary = event.summary
    lines = [
        f"{summary.run_dir}: {summary.step:,} steps, {summary.tokens:,} tokens,"
        f" {summary.seconds:.0f} s"
    ]
    losses = {
        "train_loss": summary.train_loss,
        "val_loss": summary.val_loss,
        "best_val_loss": summary.best_val_loss,
    }
    shown = [f"{name} {value:.4f}" for name, value in losses.items() if value is not None]
    lines += ["  ".join(shown)] if shown else []
    best = summary.best_val_loss
    if best is not None and best < 700:  # e to the power of more is not a float
        at = f" at step {event.best_step:,}" if event.best_step is not None else ""
        lines.append(f"perplexity {math.exp(best):,.2f} per token, best{at}")
    elif event.best_step is not None:
        lines.append(f"best epoch ended at step {event.best_step:,}")
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
        console.message(f"  {name:<14} {console.size(n_bytes):>9}  {_FILES[name]}")
    if isinstance(event, Stopped):
        console.message(f"go on with: {resume_command}")
        return
    if event.summary.checkpoint:
        checkpoint, quoted = event.summary.checkpoint, folder.as_posix()
        console.message(f"next: gpt generate --checkpoint {checkpoint}")
        console.message(f"      gpt eval {checkpoint}", "dim")
        console.message(f"      gpt report {quoted}", "dim")
