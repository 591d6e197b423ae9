"""What a training run tells: the screen, the log, the JSON lines and notebooks read the same."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, assert_never

from pydantic import TypeAdapter, ValidationError

from gptcli.formatting import loss, plural, scored, size
from gptcli.training.clock import Spent
from gptcli.training.requirements import Requirements


@dataclass(frozen=True)
class Started:
    """The run is set up and about to train."""

    run_dir: Path
    step: int
    """Steps already done: 0, or where the run resumes."""
    max_steps: int
    n_params: int
    n_windows: int
    epochs: float
    """Passes over the training windows that all its steps make."""
    tokens_per_step: int
    grad_accum_steps: int
    train_tokens: int
    val_tokens: int
    eval_tokens: int
    """Validation tokens that each evaluation scores."""
    device: str
    processes: int
    parallel: str
    """How they share the network: none, ddp or fsdp."""
    dtype: str
    compiled: bool
    tokenizer: str
    vocab_size: int
    """Ids of the tokenizer."""
    model_vocab_size: int
    """Rows of the model's embedding."""
    outlook: Requirements
    best_loss: float | None = None
    """The lowest validation loss of a resumed run (epoch loss without validation)."""
    best_step: int | None = None
    notes: tuple[str, ...] = ()
    """What the user should know: changed settings, fallbacks, a damaged checkpoint passed over."""


@dataclass(frozen=True)
class StepDone:
    """An optimizer step is done."""

    step: int
    tokens: int
    """Tokens trained on since the run began."""
    loss: float
    """Mean over the step's tokens, nats."""
    lr: float
    grad_norm: float
    """Global norm before clipping."""
    tokens_per_second: float
    """Over the steps since the last logged one, without evaluation and saving."""
    memory_bytes: int
    seconds: float
    """Wall time of the run, resumed parts added up."""
    logged: bool
    """Whether it is a line of metrics.jsonl."""
    skipped: bool = False
    """Whether nothing was changed, as the loss or the gradient was not finite."""


@dataclass(frozen=True)
class Working:
    """Something other than a step begins, and may take a while."""

    step: int
    work: str
    """evaluating, saving or sampling."""


@dataclass(frozen=True)
class EpochDone:
    """All windows of an epoch have been seen."""

    step: int
    epoch: int
    train_loss: float
    """Mean over the epoch's tokens, as they were trained on."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint is on the disk."""

    step: int
    path: Path


@dataclass(frozen=True)
class Evaluated:
    """The network was scored on fixed windows of both splits, dropout off."""

    step: int
    val_loss: float | None
    train_loss: float
    is_best: bool
    scored: tuple[int, int] = (0, 0)
    """Validation tokens that were scored, and that there are."""


@dataclass(frozen=True)
class Sampled:
    """A sample of the network's text."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class Summary:
    """How a run stands: the JSON result of `gpt train`."""

    run_dir: str
    step: int
    tokens: int
    train_loss: float | None
    val_loss: float | None
    best_val_loss: float | None
    tokens_per_second: float | None
    seconds: float
    """Wall time up to now, resumed parts added up."""
    checkpoint: str | None
    val_tokens: int | None = None
    """Validation tokens that each evaluation scores."""
    val_split_tokens: int | None = None
    best_epoch_loss: float | None = None
    """Without validation, the lowest mean training loss of an epoch."""


@dataclass(frozen=True)
class Stopped:
    """The run was asked to stop, and its state is saved."""

    step: int
    summary: Summary
    spent: Spent
    best_step: int | None = None


@dataclass(frozen=True)
class Finished:
    """The run has done all its steps."""

    step: int
    summary: Summary
    spent: Spent = field(default_factory=dict)
    """Empty if there was nothing left to do."""
    best_step: int | None = None


Event = Started | StepDone | Working | EpochDone | Saved | Evaluated | Sampled | Stopped | Finished


def summary_of(status: Mapping[str, Any]) -> Summary | None:
    """Return the summary in what status.json says, None where it holds none that is usable."""
    try:
        return TypeAdapter(Summary).validate_python(status.get("summary"))
    except ValidationError:
        return None


def metrics_of(event: Event) -> dict[str, Any] | None:
    """Return the line of metrics.jsonl for an event, or None."""
    keys: tuple[str, ...]
    match event:
        case StepDone(logged=True):
            keys = (
                "step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second",
                "memory_bytes", "seconds", *(["skipped"] if event.skipped else []),
            )  # fmt: skip
        case Evaluated():
            keys = ("step", "val_loss", "train_loss")
        case EpochDone():
            keys = ("step", "epoch", "train_loss")
        case _:
            return None
    line = {key: getattr(event, key) for key in keys}
    # JSON knows no NaN.
    return {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in line.items()}


def sample_of(event: Event) -> dict[str, Any] | None:
    """Return the line of samples.jsonl for an event, or None."""
    return asdict(event) if isinstance(event, Sampled) else None


def describe(event: Event) -> str | None:
    """Return the plain log line for an event, or None if it has none."""
    match event:
        case Started():
            return _describe_start(event)
        case StepDone(logged=False) | Working():
            return None
        case StepDone(skipped=True):
            return (
                f"step {event.step}  skipped: loss {loss(event.loss)}, grad_norm"
                f" {event.grad_norm:.2f}; the weights are as before"
            )
        case StepDone():
            return (
                f"step {event.step}  loss {loss(event.loss)}  lr {event.lr:.2e}"
                f"  grad_norm {event.grad_norm:.2f}  {event.tokens_per_second:,.0f} tokens/s"
                f"  {size(event.memory_bytes)}"
            )
        case EpochDone():
            return f"epoch {event.epoch}  train_loss {loss(event.train_loss)}  (step {event.step})"
        case Saved():
            return f"saved {event.path}"
        case Evaluated():
            val = ""
            if event.val_loss is not None:
                val = f"  val_loss {loss(event.val_loss)}{scored(*event.scored)}"
            best = "  best so far" if event.is_best else ""
            return f"eval at step {event.step}{val}  train_loss {loss(event.train_loss)}{best}"
        case Sampled():
            return f"sample at step {event.step}:\n{event.prompt}{event.text}"
        case Stopped():
            return f"stopped at step {event.step}, saved{_describe_spent(event.spent)}"
        case Finished():
            return f"finished at step {event.step}{_describe_spent(event.spent)}"
        case unreachable:
            assert_never(unreachable)


def _describe_spent(spent: Spent) -> str:
    """Say in a line where the time went, shares of a percent left out."""
    total = sum(spent.values())
    parts = [f"{work} {seconds / total:.1%}" for work, seconds in spent.items()
             if seconds >= 0.001 * total]  # fmt: skip
    return f"\ntime: {total:.1f} s: {', '.join(parts)}" if parts else ""


def _describe_start(event: Started) -> str:
    compiled = ", compiled" if event.compiled else ""
    device = event.device
    if event.processes > 1:
        device = f"{event.processes} x {device} ({event.parallel})"
    goal = f"from step {event.step:,} to " * bool(event.step) + f"{event.max_steps:,}"
    lines = [
        f"run {event.run_dir}: {event.n_params:,} parameters on {device}, {event.dtype}{compiled}",
        f"data: {event.train_tokens:,} + {event.val_tokens:,} tokens,"
        f" {vocabulary(event.tokenizer, event.vocab_size, event.model_vocab_size)}",
        f"steps: {goal} of {event.tokens_per_step:,} tokens, {plural(event.epochs, 'epoch')}",
        *_describe_evaluation(event),
        *_describe_needs(event.outlook),
        *(f"note: {note}" for note in event.notes),
        *(f"advice: {one}" for one in event.outlook.advice),
    ]
    return "\n".join(lines)


def _describe_evaluation(event: Started) -> list[str]:
    """Say on how much of the validation split the losses are measured, if not on all of it."""
    part = scored(event.eval_tokens, event.val_tokens).strip(" ()")
    return [f"evaluation: {part} of the validation split"] if part else []


def vocabulary(tokenizer: str, n_ids: int, n_rows: int) -> str:
    """Say how large a tokenizer's vocabulary is, and the model's if that is another."""
    padded = f" (the model has {n_rows:,} rows)" if n_rows != n_ids else ""
    return f"{tokenizer} of {n_ids:,} ids{padded}"


def _describe_needs(outlook: Requirements) -> list[str]:
    """Say what a run needs of memory and disk, and what there is."""
    memory, disk = outlook.memory, outlook.disk
    each = f" for each of {memory.processes} processes" if memory.processes > 1 else ""
    there = f" of {size(memory.available)}" if memory.available is not None else ""
    return [
        f"memory: about {size(memory.total)}{each}{there} (estimate)",
        f"disk: {size(disk.needed)} for checkpoints, {size(disk.free)} free",
    ]
