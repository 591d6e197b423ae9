"""What a training run reports: the screen, the log, the JSON lines and notebooks read the same."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, assert_never

from pydantic import TypeAdapter, ValidationError

from gptcli.formatting import loss, scored, shares, size
from gptcli.runs import METRICS, SAMPLES
from gptcli.runs.record import SourceLoss
from gptcli.training.spec import RunSpec

if TYPE_CHECKING:
    from gptcli.training.plan import Plan

Spent = dict[str, float]  # seconds of a run, by what they were spent on


@dataclass(frozen=True)
class Started:
    """The run is set up and about to train."""

    plan: "Plan"
    step: int  # steps already done: 0, or where the run resumes
    # the lowest validation loss of a resumed run (epoch loss without validation)
    best_loss: float | None = None
    best_step: int | None = None
    # what the user should know: changed settings, fallbacks, a skipped checkpoint
    notes: tuple[str, ...] = ()

    @property
    def spec(self) -> RunSpec:
        """The settled run."""
        return self.plan.spec

    @property
    def run_dir(self) -> Path:
        """The run folder."""
        return self.spec.config.run_folder


@dataclass(frozen=True)
class StepDone:
    """An optimizer step is done."""

    step: int
    tokens: int  # tokens trained on since the run began
    loss: float  # mean over the step's tokens, nats
    lr: float
    grad_norm: float  # global norm before clipping
    # over the steps since the last logged one, without evaluation and saving
    tokens_per_second: float
    memory_bytes: int
    seconds: float  # wall time of the run, resumed parts added up
    logged: bool  # whether it is a line of metrics.jsonl
    # whether nothing changed, because the loss or the gradient was not finite
    skipped: bool = False


@dataclass(frozen=True)
class Working:
    """Something other than a step begins."""

    step: int
    work: str  # evaluating, saving or sampling


@dataclass(frozen=True)
class EpochDone:
    """All windows of an epoch have been seen."""

    step: int
    epoch: int
    train_loss: float  # mean over the epoch's tokens, as they were trained on


@dataclass(frozen=True)
class Saved:
    """A checkpoint is on the disk."""

    step: int
    path: Path


@dataclass(frozen=True)
class Evaluated:
    """The model was scored on fixed windows of both splits, without dropout."""

    step: int
    val_loss: float | None
    train_loss: float
    is_best: bool
    scored: tuple[int, int] = (0, 0)  # validation tokens that were scored, and all there are
    # of a mixture, whose losses above are the means of these by the weights at the end of the run
    sources: Mapping[str, SourceLoss] = field(default_factory=dict)


@dataclass(frozen=True)
class Sampled:
    """A sample of the model's text."""

    step: int
    prompt: str
    text: str


@dataclass(frozen=True)
class Summary:
    """The outcome of a run so far: the JSON result of `gpt train`."""

    run_dir: str
    step: int
    tokens: int
    train_loss: float | None
    val_loss: float | None
    best_val_loss: float | None
    tokens_per_second: float | None
    seconds: float  # wall time of the run, resumed parts added up
    checkpoint: str | None
    val_tokens: int | None = None  # validation tokens that each evaluation scores
    val_split_tokens: int | None = None
    # without validation, the lowest mean training loss of an epoch
    best_epoch_loss: float | None = None


@dataclass(frozen=True)
class Stopped:
    """The run was asked to stop, and its state is saved."""

    step: int
    summary: Summary
    spent: Spent
    best_step: int | None = None


@dataclass(frozen=True)
class Finished:
    """The run has done all its steps, or no further ones help."""

    step: int
    summary: Summary
    spent: Spent = field(default_factory=dict)  # empty if there was nothing left to do
    best_step: int | None = None
    reason: str = ""  # why it ended before its last step


Event = Started | StepDone | Working | EpochDone | Saved | Evaluated | Sampled | Stopped | Finished


def summary_of(status: Mapping[str, Any]) -> Summary | None:
    """Return the summary in the content of status.json, or None."""
    try:
        return TypeAdapter(Summary).validate_python(status.get("summary"))
    except ValidationError:
        return None


def history_line(event: Event) -> tuple[str, dict[str, Any]] | None:
    """Return the file of the run folder that records an event, and its line there; or None."""
    match event:
        case StepDone(logged=True):
            left_out = {"logged"} if event.skipped else {"logged", "skipped"}
        case Evaluated():
            left_out = {"is_best", "scored"} | ({"sources"} if not event.sources else set())
        case EpochDone():
            left_out = set()
        case Sampled():
            return SAMPLES, asdict(event)
        case _:
            return None
    line = {key: value for key, value in asdict(event).items() if key not in left_out}
    # JSON knows no NaN.
    return METRICS, {key: None if isinstance(value, float) and not math.isfinite(value) else value
                     for key, value in line.items()}  # fmt: skip


def describe(event: Event) -> str | None:
    """Return the plain log line for an event, or None if it has none."""
    match event:
        case Started():
            lines = [*event.plan.lines(event.step), *(("note", note) for note in event.notes),
                     *(("advice", str(one)) for one in event.plan.advice)]  # fmt: skip
            return "\n".join(f"{label}: {text}" if label else f"  {text}" for label, text in lines)
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
            of = ", ".join(f"{name} {loss(each.loss)}" for name, each in event.sources.items())
            losses = f"{val}  train_loss {loss(event.train_loss)}{best}"
            return f"eval at step {event.step}{losses}" + f"  ({of})" * bool(of)
        case Sampled():
            return f"sample at step {event.step}:\n{event.prompt}{event.text}"
        case Stopped():
            return f"stopped at step {event.step}, saved{_describe_spent(event.spent)}"
        case Finished():
            reason = f": {event.reason}" * bool(event.reason)
            return f"finished at step {event.step}{reason}{_describe_spent(event.spent)}"
        case unreachable:
            assert_never(unreachable)


def _describe_spent(spent: Spent) -> str:
    """Return a line with the time by kind of work."""
    parts = [f"{work} {share}" for work, share in shares(spent).items()]
    return f"\ntime: {sum(spent.values()):.1f} s: {', '.join(parts)}" if parts else ""


class Clock:
    """The time of a run, by what it is spent on; continues what was spent before."""

    def __init__(self, before: Spent) -> None:
        self._began = time.perf_counter() - sum(before.values())
        self._spent = dict(before)

    def add(self, work: str, seconds: float) -> None:
        """Count some of the time as spent on a kind of work."""
        self._spent[work] = self._spent.get(work, 0.0) + seconds

    @contextlib.contextmanager
    def during(self, work: str) -> Iterator[None]:
        """Count what the block takes."""
        began = time.perf_counter()
        yield
        self.add(work, time.perf_counter() - began)

    @property
    def seconds(self) -> float:
        """Wall time of the run so far."""
        return time.perf_counter() - self._began

    def spent(self) -> Spent:
        """Return the seconds by kind of work; what was not counted is "other"."""
        known = {work: spent for work, spent in self._spent.items() if work != "other"}
        return {**known, "other": self.seconds - sum(known.values())}


def spent_before(status: Mapping[str, Any], step: int, seconds: float) -> Spent:
    """Return the time of a run by kind of work before it was resumed at a step.

    The checkpoint says `seconds`; status.json may be older or newer than it.
    """
    try:
        spent = TypeAdapter(Spent).validate_python(status.get("seconds_by_work"))
    except ValidationError:
        spent = {}
    total = sum(spent.values())
    if not 0 < total < math.inf or min(spent.values()) < 0:
        return {"other": seconds}
    if status.get("step") == step and total > seconds:  # an evaluation after it counts too
        return spent
    return {work: part / total * seconds for work, part in spent.items()}
