"""The plan of a run as text: what `gpt train --dry-run` prints."""

import shutil
import sys
import textwrap
from typing import TYPE_CHECKING

from gptcli.formatting import count, duration, plural, scored, size
from gptcli.terminal import console
from gptcli.training.events import vocabulary
from gptcli.training.requirements import Advice, Disk, Memory

if TYPE_CHECKING:
    from gptcli.training.plan import Plan
    from gptcli.training.timing import TimedSteps

_LABEL = 12


def show_plan(plan: "Plan") -> None:
    """Print to stdout what is known of a run without measuring."""
    for label, text in _lines(plan):
        _show(label, text)
    outlook = plan.outlook
    if not outlook.memory.fits:
        _show("memory", "exceeds the available memory", "bold red")
    if outlook.disk.needed - outlook.disk.held > outlook.disk.free:
        _show("disk", "exceeds the free disk space", "bold red")
    _show_advice(outlook.advice)


def show_time(plan: "Plan", rehearsal: "TimedSteps | None") -> None:
    """Print to stdout how long a run takes, as far as that was measured."""
    _show("time", _time(plan, rehearsal))
    _show_advice(plan.measured_advice(rehearsal))


def _show_advice(advice: tuple[Advice, ...]) -> None:
    for one in advice:
        _show("advice", f"{one.what}: {one.why}", "yellow")
        if one.set:
            _show("", f"try: {one.set}")


def _show(label: str, text: str, style: str = "dim") -> None:
    """Print a line, at a terminal in several below one another; settings to copy stay whole."""
    lines = [text]
    if sys.stdout is not None and sys.stdout.isatty() and label:
        width = max(40, shutil.get_terminal_size().columns - _LABEL)
        lines = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)
    for head, line in zip([label, *[""] * len(lines)], lines, strict=False):
        console.styled((f"{head:<{_LABEL}}", style), (line, ""))


def _lines(plan: "Plan") -> list[tuple[str, str]]:
    learn = (
        f", {plan.trained_parameters:,} of them trained"
        if plan.trained_parameters < plan.parameters
        else ""
    )
    start = "" if plan.init_from == "scratch" else f", from {plan.init_from}"
    where = plan.device if plan.processes == 1 else f"{plan.processes} x {plan.device}"
    shared = "" if plan.parallel == "none" else f" ({plan.parallel})"
    compiled = ", compiled" if plan.compile else ""
    micro = f"{plan.rows:,} x {plan.grad_accum_steps:,}"
    micro += f" x {plan.processes}" * (plan.processes > 1)
    taken = " (holds a run: --resume continues it, --overwrite renames it)"
    return [
        ("run", plan.run_dir + taken * plan.holds_run),
        ("network", f"{plan.parameters:,} parameters{learn}{start}"),
        ("machine", f"{where}{shared}, {plan.dtype}{compiled}"),
        ("data", f"{plan.data_dir}: {plan.train_tokens:,} + {plan.val_tokens:,} tokens,"
                 f" {vocabulary(plan.tokenizer, plan.vocab_size, plan.model_vocab_size)}"),
        ("steps", f"{plan.max_steps:,} of {plural(plan.tokens_per_step, 'token')}"
                  f" (rows: {micro}), {plural(plan.epochs, 'epoch')}"),
        ("evaluation", f"{plural(plan.evaluations, 'time')}, {_scored(plan)}"),
        ("memory", _memory(plan.outlook.memory)),
        ("disk", _disk(plan.outlook.disk)),
    ]  # fmt: skip


def _scored(plan: "Plan") -> str:
    """Say on how much of each split an evaluation measures the losses."""
    splits = ((plan.eval_tokens, plan.val_tokens, "validation"),
              (plan.eval_train_tokens, plan.train_tokens, "training"))  # fmt: skip
    return " and ".join(
        f"{scored(n, of).strip(' ()') or f'{n:,} tokens'} of the {split} split"
        for n, of, split in splits if n
    )  # fmt: skip


def _memory(memory: Memory) -> str:
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "program": memory.program,
    }
    shown = ", ".join(f"{name} {size(n)}" for name, n in parts.items() if n)
    each = f" for each of {memory.processes} processes" if memory.processes > 1 else ""
    there = f" of {size(memory.available)}" if memory.available is not None else ""
    return f"about {size(memory.total)}{each}{there}, an estimate: {shown}"


def _disk(disk: Disk) -> str:
    return (
        f"{size(disk.needed)} for checkpoints of {size(disk.checkpoint)} each;"
        f" {size(disk.free)} free"
    )


def _time(plan: "Plan", rehearsal: "TimedSteps | None") -> str:
    if rehearsal is None:
        why = "the model is sharded" if plan.parallel == "fsdp" else "too little memory"
        return f"not measured: {why}"
    if not rehearsal.seconds_per_step:
        return "nothing left to do"
    spent = plan.seconds_left(rehearsal)
    shown = ", ".join(
        f"{work} {duration(seconds)}" for work, seconds in spent.items() if seconds >= 0.5
    )
    rate = plan.tokens_per_step / rehearsal.seconds_per_step
    alone = " on one process" if plan.processes > 1 else ""
    rest = f" from step {rehearsal.step:,}" if rehearsal.step else ""
    return (
        f"about {duration(sum(spent.values()))}{rest}{f' ({shown})' * bool(shown)},"
        f" measured over batches of up to {plural(rehearsal.measured_tokens, 'token')}:"
        f" {duration(rehearsal.seconds_per_step)} a step, {count(rate)} tokens/s{alone}"
    )
