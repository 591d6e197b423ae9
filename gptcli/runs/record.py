"""What is known of a run: the names of its files, the records in them, the run as a whole."""

import bisect
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from gptcli.config.windows import epochs, eval_tokens, training_windows

# A folder that holds RUN holds a run.
RUNS = Path("runs")
RUN, STATUS, METRICS, SAMPLES = "run.json", "status.json", "metrics.jsonl", "samples.jsonl"
CONFIG, LOG, BEST, LAST = "config.yaml", "log.txt", "best.pt", "last.pt"

# Beyond what training can write; arithmetic on what is left neither overflows nor fails.
Int = Annotated[int, Field(ge=0, lt=2**63)]
Float = Annotated[float, Field(gt=-1e39, lt=1e39)]


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, allow_inf_nan=False, protected_namespaces=())


class Step(_Row):
    """A logged optimizer step; numbers that were not finite are None."""

    step: Int
    tokens: Int  # tokens trained on since the run began
    loss: Float | None  # mean over the step's tokens, nats
    lr: Float
    grad_norm: Float | None = None
    tokens_per_second: Float | None = None
    memory_bytes: Int | None = None
    seconds: Float  # wall time of the run, resumed parts added up
    skipped: bool = False


@dataclass(frozen=True)
class SourceLoss:
    """The losses of an evaluation on one source of a mixture."""

    val_loss: Float | None
    train_loss: Float | None

    @property
    def loss(self) -> float | None:
        """That of the validation text, if there is any."""
        return self.train_loss if self.val_loss is None else self.val_loss


class Evaluation(_Row):
    """The losses of an evaluation, nats per token; without validation, `val_loss` is None."""

    step: Int
    val_loss: Float | None
    train_loss: Float | None
    sources: dict[str, SourceLoss] = {}


class Epoch(_Row):
    """The mean loss of an epoch, as its tokens were trained on."""

    step: Int
    epoch: Int
    train_loss: Float | None


class Other(_Row):
    """A line of a kind that a later version may add."""

    step: Int = 0


class TextSample(_Row):
    """A text that the model wrote during training."""

    step: Int
    prompt: str
    text: str


class Counts(_Row):
    """A number for each split."""

    train: Int = 0
    val: Int = 0


class DataFacts(_Row):
    """Which data a run was trained on."""

    dir: str | None = None
    source: str | None = None
    revision: str | None = None
    fingerprint: str | None = None
    tokenizer: str | None = None
    tokens: Counts = Counts()
    bytes: Counts = Counts()
    parts: dict[str, "DataFacts"] = {}  # the sources of a mixture, by name


class RunFacts(_Row):
    """What run.json records: when, by which command, program and machine, on which data."""

    created: str | None = None
    command: tuple[str, ...] = ()
    gptcli: str | None = None
    torch: str | None = None
    python: str | None = None
    platform: str | None = None
    threads: Int | None = None
    parameters: Int | None = None
    origin: dict[str, Any] = {}
    # keys that were set by a file or the command line; None before that was recorded
    given: tuple[str, ...] | None = None
    data: DataFacts = DataFacts()


class Status(_Row):
    """What status.json says; `state` is running, stopped, finished or failed."""

    state: str = "unknown"
    step: Int = 0
    exit_code: Int | None = None
    pid: Int | None = None
    host: str | None = None
    time: str | None = None
    error: str | None = None
    seconds_by_work: dict[str, Float] = {}


@dataclass(frozen=True)
class RunHistory:
    """A run as its folder holds it at one moment."""

    folder: Path
    name: str
    settings: Mapping[str, object]  # every value of config.yaml by its dotted key
    facts: RunFacts
    status: Status
    steps: tuple[Step, ...]  # those logged, in order; so are evaluations, epochs and samples
    evaluations: tuple[Evaluation, ...]
    epochs: tuple[Epoch, ...]
    samples: tuple[TextSample, ...]
    checkpoints: Mapping[str, int]  # names in the run folder and bytes
    problems: tuple[str, ...]  # files and lines that could not be read, one line each

    @property
    def state(self) -> str:
        """Its status, or `died` if its process is gone but did not record why."""
        status = self.status
        return "died" if status.state == "running" and _is_gone(status) else status.state

    @property
    def step(self) -> int:
        """The last step known to be done."""
        last: tuple[Step | Evaluation, ...] = (*self.steps[-1:], *self.evaluations[-1:])
        return max([self.status.step, *(row.step for row in last)])

    @property
    def best(self) -> Evaluation | None:
        """The evaluation of the lowest validation loss; the first of equals, as best.pt is."""
        scored = [row for row in self.evaluations if row.val_loss is not None]
        return min(scored, key=lambda row: row.val_loss or 0.0, default=None)

    @property
    def best_epoch(self) -> Epoch | None:
        """The epoch of the lowest mean loss, which chooses best.pt where nothing is validated."""
        if self.best is not None:
            return None
        known = [row for row in self.epochs if row.train_loss is not None]
        return min(known, key=lambda row: row.train_loss or 0.0, default=None)

    @property
    def best_point(self) -> tuple[int, float] | None:
        """Step and loss that chose best.pt."""
        if self.best is not None and self.best.val_loss is not None:
            return self.best.step, self.best.val_loss
        epoch = self.best_epoch
        return (epoch.step, epoch.train_loss) if epoch and epoch.train_loss is not None else None

    @property
    def max_steps(self) -> int | None:
        """The steps the run is to have, where its settings say so."""
        return self._count("train.max_steps")

    @property
    def eval_tokens(self) -> int | None:
        """Validation tokens that each evaluation scores."""
        n, seq_len = self.facts.data.tokens, self._count("data.seq_len")
        if not (n.train and n.val and seq_len):
            return None
        counts = [part.tokens for part in self.facts.data.parts.values()] or [n]
        sizes = [(each.train, each.val) for each in counts]
        return eval_tokens(sizes, seq_len, self._count("train.eval_tokens"))[1]

    def epochs_at(self, step: int) -> float | None:
        """Return the passes over the training windows that `step` steps make."""
        seq_len, stride = self._count("data.seq_len"), self._count("data.stride")
        tokens, n_train = self._count("train.tokens_per_step"), self.facts.data.tokens.train
        if not (seq_len and stride and tokens and n_train):
            return None
        return epochs(step, tokens // seq_len, training_windows(n_train, seq_len, stride))

    def _count(self, key: str) -> int | None:
        """Return a setting that is a number of things."""
        value = self.settings.get(key)
        is_count = isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**63
        return value if is_count else None  # type: ignore[return-value]

    @property
    def seconds(self) -> float:
        """Wall time of the run, resumed parts added up, as far as it was recorded."""
        return max(self.seconds_at(self.step), sum(self.status.seconds_by_work.values()))

    def tokens_at(self, step: int) -> float:
        """Return the tokens trained on after `step` steps."""
        each = self._count("train.tokens_per_step")
        return step * each if each else self._at(step, lambda row: row.tokens)

    def seconds_at(self, step: int) -> float:
        """Return the wall time of the run after `step` steps, between logged ones in proportion."""
        return self._at(step, lambda row: row.seconds)

    def _at(self, step: int, value_of: Callable[[Step], float]) -> float:
        """Interpolate a value of the logged steps; before the first one from zero."""
        after = bisect.bisect_left(self.steps, step, key=lambda row: row.step)
        if after == len(self.steps):
            return float(value_of(self.steps[-1])) if self.steps else 0.0
        number, value = self.steps[after].step, value_of(self.steps[after])
        before = self.steps[after - 1] if after else None
        last, start = (before.step, value_of(before)) if before else (0, 0.0)
        gap = number - last
        return start + (value - start) * (step - last) / gap if gap else value


def _is_gone(status: Status) -> bool:
    """Tell whether the training process no longer exists, as far as this machine can know."""
    if os.name == "nt" or status.pid is None or status.host != socket.gethostname():
        return False
    try:
        os.kill(status.pid, 0)
    except (OSError, OverflowError) as error:
        return isinstance(error, ProcessLookupError)
    return False
