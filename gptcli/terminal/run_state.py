"""The state of a run while it trains: its events, taken together."""

import math
from dataclasses import dataclass, field

from gptcli.plotting.curves import Curve, thinned
from gptcli.training import events

_SMOOTHED_STEPS = 50  # that the smoothed loss averages over, roughly
_STEPS_TO_JUDGE = 3  # before the time left is shown
_MAX_POINTS = 1024  # kept of the loss, whose extremes stay


@dataclass
class RunState:
    """The state of the display."""

    began: float  # when it was made, by a monotonic clock, seconds; so are the other times
    started: events.Started | None = None
    started_at: float = 0.0
    now: events.StepDone | None = None
    now_at: float = 0.0
    work: str = "setting up"  # what is being done
    smoothed: float | None = None  # a running mean of the loss
    evaluated: events.Evaluated | None = None
    best: tuple[int, float] | None = None  # step and loss of the best so far
    marks: list[tuple[int, float]] = field(default_factory=list)  # step and validation loss
    sample: events.Sampled | None = None
    saved: tuple[int, float] | None = None  # step and time of the last save
    skipped: int = 0  # steps that changed nothing
    losses: list[tuple[int, float]] = field(default_factory=list)  # steps and losses, thinned
    _weight: float = 0.0
    _sum: float = 0.0

    def update(self, event: events.Event, at: float) -> None:
        """Take in an event that came at a time of the clock."""
        if not isinstance(event, events.Working):
            self.work = "training"
        match event:
            case events.Started():
                self.started, self.started_at = event, at
                if event.best_step is not None and event.best_loss is not None:
                    self.best = event.best_step, event.best_loss
            case events.StepDone():
                self._step(event)
                self.now_at = at
            case events.Working():
                self.work = event.work
            case events.Evaluated() | events.EpochDone():
                self._score(event)
            case events.Sampled():
                self.sample = event
            case events.Saved():
                self.saved = event.step, at
            case events.Stopped():
                self.work = "stopped"
            case events.Finished():
                self.work = "finished"

    def _score(self, event: events.Evaluated | events.EpochDone) -> None:
        if isinstance(event, events.Evaluated):
            self.evaluated = event
            if event.val_loss is not None:
                self.marks.append((event.step, event.val_loss))
                self.best = self.marks[-1] if event.is_best else self.best
        # Where nothing is validated, epochs decide which is best.
        elif self.started is not None and not self.started.spec.val_tokens:
            if self.best is None or event.train_loss < self.best[1]:
                self.best = event.step, event.train_loss

    def _step(self, event: events.StepDone) -> None:
        self.now = event
        if event.skipped or not math.isfinite(event.loss):
            self.skipped += 1
            return
        # An exponential moving average, corrected for having started at zero.
        keep = 1 - 1 / _SMOOTHED_STEPS
        self._weight = keep * self._weight + 1 - keep
        self._sum = keep * self._sum + (1 - keep) * event.loss
        self.smoothed = self._sum / self._weight
        self.losses.append((event.step, event.loss))
        if len(self.losses) > 2 * _MAX_POINTS:
            steps, losses = zip(*self.losses, strict=True)
            curve = thinned(Curve(steps, losses), _MAX_POINTS)
            self.losses = [(int(x), y) for x, y in zip(curve.x, curve.y, strict=True)]

    @property
    def step(self) -> int:
        """Steps done."""
        if self.now is not None:
            return self.now.step
        return self.started.step if self.started is not None else 0

    @property
    def has_ended(self) -> bool:
        """Whether the run has ended."""
        return self.work in ("finished", "stopped", "failed")

    def seconds(self, at: float) -> float:
        """Return the wall time of the run, resumed parts added up."""
        if self.now is None:
            return at - self.started_at
        return self.now.seconds + (0.0 if self.has_ended else at - self.now_at)

    def seconds_left(self, at: float) -> float | None:
        """Return the time left at the pace so far; None while that is not known."""
        if self.started is None or self.now is None:
            return None
        done = self.now.step - self.started.step
        if done < min(_STEPS_TO_JUDGE, self.started.spec.max_steps - self.started.step):
            return None
        return (at - self.started_at) / done * (self.started.spec.max_steps - self.now.step)

    def mfu(self) -> float | None:
        """Return the model FLOPs utilization of all devices; None if their peak is not known."""
        plan = self.started.plan if self.started is not None else None
        if plan is None or self.now is None or plan.peak_flops is None:
            return None
        most = plan.peak_flops * plan.spec.n_processes
        return self.now.tokens_per_second * plan.flops_per_token / most
