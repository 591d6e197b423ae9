"""What `gpt train` prints before a run and after it: the plan of --dry-run, and the summary."""

import shlex
import shutil
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from gptcli.formatting import count, duration, loss, perplexity, plural, scored, size
from gptcli.runs import BEST, LAST, METRICS, SAMPLES
from gptcli.runs.find import next_commands
from gptcli.terminal import console
from gptcli.training.events import Finished, Stopped

if TYPE_CHECKING:
    from gptcli.training.advice import Advice
    from gptcli.training.plan import Plan, TimedSteps

_LABEL = 12
_FILES = {
    BEST: "the best weights",
    LAST: "the newest state",
    "base.pt": "the weights that adapters belong to",
    "loss.pdf": "the curves",
    METRICS: "every logged step",
    SAMPLES: "every sample",
}


def show_plan(plan: "Plan") -> None:
    """Print to stdout what is known of a run without measuring."""
    for label, text in plan.lines():
        held = " (holds a run: --resume continues it, --overwrite renames it)"
        _show(label, text + held * (label == "run" and plan.holds_run))
    if not plan.memory.fits:
        _show("memory", "exceeds the available memory", "bold red")
    if not plan.disk.fits:
        _show("disk", "exceeds the free disk space", "bold red")
    _show_advice(plan.advice)


def show_time(plan: "Plan", timing: "TimedSteps | None") -> None:
    """Print to stdout how long a run takes, as far as that was measured."""
    _show("time", _time(plan, timing))
    _show_advice(plan.measured_advice(timing))


def summary_text(event: Stopped | Finished) -> str:
    """Return the result of `gpt train`: how long, which losses, what they mean."""
    summary = event.summary
    lines = [
        f"{summary.run_dir}: {plural(summary.step, 'step')}, {plural(summary.tokens, 'token')},"
        f" {duration(summary.seconds)}"
    ]
    part = scored(summary.val_tokens, summary.val_split_tokens)
    losses = (("train_loss", summary.train_loss, ""), ("val_loss", summary.val_loss, part),
              ("best_val_loss", summary.best_val_loss, ""))  # fmt: skip
    shown = [f"{name} {loss(value)}{part}" for name, value, part in losses if value is not None]
    lines += ["  ".join(shown)] if shown else []
    if summary.best_val_loss is not None:
        at = f" at step {event.best_step:,}" if event.best_step is not None else ""
        lines.append(f"perplexity {perplexity(summary.best_val_loss)} per token, best{at}")
    elif event.best_step is not None:
        known = summary.best_epoch_loss is not None
        mean = f": mean training loss {loss(summary.best_epoch_loss)}" * known
        lines.append(f"best epoch ended at step {event.best_step:,}{mean}")
    if isinstance(event, Finished) and event.reason:
        lines.append(f"stopped early: {event.reason}")
    return "\n".join(lines)


def say_next(event: Stopped | Finished, resume_command: str, minutes: float | None) -> None:
    """Print to stderr the files of the run and the commands to continue with."""
    folder = Path(event.summary.run_dir)
    files = {name: folder / name for name in _FILES if (folder / name).is_file()}
    if files:
        console.message(f"files in {folder}:")
    for name, path in files.items():
        console.message(f"  {name:<14} {size(path.stat().st_size):>9}  {_FILES[name]}")
    if isinstance(event, Stopped):
        console.message(f"resume with: {resume_command}")
        return
    if event.reason:
        console.message(f"to train further: {resume_command} -s train.stop_after=null")
    elif not event.spent:
        longer = f"-s train.max_steps={2 * event.step}"
        if minutes:
            longer = f"--minutes {2 * max(minutes, event.summary.seconds / 60):.3g}"
        console.message(f"all steps are done; to train longer: {resume_command} {longer}")
    if event.summary.checkpoint:
        is_validated = event.summary.best_val_loss is not None
        first, *more = next_commands(event.summary.checkpoint, is_validated=is_validated)
        console.message(f"next: {first}")
        for command in (*more, shlex.join(["gpt", "report", folder.as_posix()])):
            console.message(f"      {command}", "dim")


def _show_advice(advice: "tuple[Advice, ...]") -> None:
    for one in advice:
        _show("advice", f"{one.what}: {one.why}", "yellow")
        if one.set:
            _show("", f"try: {one.set}")


def _show(label: str, text: str, style: str = "dim") -> None:
    """Print a line, folded at a terminal; settings to copy, which have no label, stay whole."""
    lines = [text]
    if sys.stdout is not None and sys.stdout.isatty() and label:
        width = max(40, shutil.get_terminal_size().columns - _LABEL)
        lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    for head, line in zip([label, *[""] * len(lines)], lines, strict=False):
        console.styled((f"{head:<{_LABEL}}", style), (line, ""))


def _time(plan: "Plan", timing: "TimedSteps | None") -> str:
    if timing is None:
        why = "the model is sharded" if plan.spec.parallel == "fsdp" else "too little memory"
        return f"not measured: {why}"
    if not timing.seconds_per_step:
        return "nothing left to do"
    spent = plan.seconds_left(timing)
    shown = ", ".join(f"{work} {duration(part)}" for work, part in spent.items() if part >= 0.5)
    rate = plan.spec.tokens_per_step / timing.seconds_per_step
    alone = " on one process" if plan.spec.n_processes > 1 else ""
    rest = f" from step {timing.step:,}" if timing.step else ""
    return (
        f"about {duration(sum(spent.values()))}{rest}{f' ({shown})' * bool(shown)},"
        f" measured over batches of up to {plural(timing.measured_tokens, 'token')}:"
        f" {duration(timing.seconds_per_step)} a step, {count(rate)} tokens/s{alone}"
    )
