"""What is known of a run while it trains: the events, taken together.

Knows no terminal: how it is drawn is for others.
"""

import math
from dataclasses import dataclass, field

from gptcli.terminal.sparkline import LossHistory
from gptcli.training.events import (
    EpochDone,
    Evaluated,
    Event,
    Finished,
    Sampled,
    Saved,
    Started,
    StepDone,
    Stopped,
    Working,
)

_SMOOTHED_STEPS = 50  # that the smoothed loss looks back over, roughly
_STEPS_TO_JUDGE = 3  # before the time left is told


@dataclass
class RunState:
    """The state of the display.

    Attributes:
        began: When it was made, by a clock that only goes forward, seconds.
        started: The run, once it is set up.
        started_at: When that was.
        now: The last step.
        now_at: When that was done.
        work: What is being done.
        smoothed: Of the loss; None before the first.
        evaluated: The last evaluation.
        best: Step and loss of the best so far.
        marks: Step and validation loss of each evaluation.
        sample: The newest.
        saved: Step and time of the last save.
        skipped: Steps that changed nothing.
        course: Of the training loss.
    """

    began: float
    started: Started | None = None
    started_at: float = 0.0
    now: StepDone | None = None
    now_at: float = 0.0
    work: str = "setting up"
    smoothed: float | None = None
    evaluated: Evaluated | None = None
    best: tuple[int, float] | None = None
    marks: list[tuple[int, float]] = field(default_factory=list)
    sample: Sampled | None = None
    saved: tuple[int, float] | None = None
    skipped: int = 0
    course: LossHistory = field(default_factory=LossHistory)
    _weight: float = 0.0
    _sum: float = 0.0

    def update(self, event: Event, at: float) -> None:
        """Take an event that came at some time of the clock."""
        if not isinstance(event, Working):
            self.work = "training"
        match event:
            case Started():
                self.started, self.started_at = event, at
                if event.best_step is not None and event.best_loss is not None:
                    self.best = event.best_step, event.best_loss
            case StepDone():
                self._step(event)
                self.now_at = at
            case Working():
                self.work = event.work
            case Evaluated() | EpochDone():
                self._score(event)
            case Sampled():
                self.sample = event
            case Saved():
                self.saved = event.step, at
            case Stopped() | Finished():
                self.work = "stopped" if isinstance(event, Stopped) else "finished"
            case _:
                pass

    def _score(self, event: Evaluated | EpochDone) -> None:
        """Take a loss that decides what is best: of validation, or of epochs without it."""
        if isinstance(event, EpochDone):
            has_val = self.started is not None and self.started.val_tokens
            if not has_val and (self.best is None or event.train_loss < self.best[1]):
                self.best = event.step, event.train_loss
            return
        self.evaluated = event
        if event.val_loss is not None:
            self.marks.append((event.step, event.val_loss))
            if event.is_best:
                self.best = event.step, event.val_loss

    def _step(self, event: StepDone) -> None:
        self.now = event
        if event.skipped or not math.isfinite(event.loss):
            self.skipped += 1
            return
        # A mean that weighs the past less and less, corrected for having begun at zero.
        keep = 1 - 1 / _SMOOTHED_STEPS
        self._weight = keep * self._weight + 1 - keep
        self._sum = keep * self._sum + (1 - keep) * event.loss
        self.smoothed = self._sum / self._weight
        self.course.add(event.step, event.loss)

    @property
    def step(self) -> int:
        """Steps done."""
        if self.now is not None:
            return self.now.step
        return self.started.step if self.started is not None else 0

    @property
    def has_ended(self) -> bool:
        """Whether nothing more is to come."""
        return self.work in ("finished", "stopped", "failed")

    def seconds(self, at: float) -> float:
        """Return the wall time of the run, resumed parts added up."""
        if self.now is None:
            return at - self.started_at
        return self.now.seconds + (0.0 if self.has_ended else at - self.now_at)

    def seconds_left(self, at: float) -> float | None:
        """Return the time the rest will take at the pace so far; None while that is not known."""
        if self.started is None or self.now is None:
            return None
        done = self.now.step - self.started.step
        if done < min(_STEPS_TO_JUDGE, self.started.max_steps - self.started.step):
            return None
        return (at - self.started_at) / done * (self.started.max_steps - self.now.step)

    def mfu(self) -> float | None:
        """Return the share of the devices' arithmetic that training uses; None if not known."""
        if self.started is None or self.now is None or self.started.outlook.peak_flops is None:
            return None
        most = self.started.outlook.peak_flops * self.started.processes
        return self.now.tokens_per_second * self.started.outlook.flops_per_token / most
