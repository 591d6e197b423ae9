"""TensorBoard and Weights & Biases, told what metrics.jsonl is told.

Off unless `train.loggers` names them. Whatever goes wrong in one of them ends that one, never the
run. Knows no terminal and no network; the packages are imported where they are used.
"""

import hashlib
import importlib
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from gptcli import atomic
from gptcli.config.schema import LoggerName
from gptcli.errors import ConfigError
from gptcli.runs import CONFIG, METRICS, RUN, SAMPLES
from gptcli.training.events import Event, Started, metrics_of, sample_of

Values = Mapping[str, float | str]
Tell = Callable[[str], None]

_FILES = (METRICS, SAMPLES)
_GROUPS = {"val_loss": "eval", "epoch": "epoch", "loss": "train"}


def require(names: Sequence[LoggerName]) -> None:
    """Refuse loggers whose package is not installed.

    Raises:
        ConfigError: With the command that installs it.
    """
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name is no package
            raise ConfigError(
                f"train.loggers: {name} is not installed", f"pip install 'gptcli[{name}]'"
            )


class Tracker(Protocol):
    """Somewhere that curves are kept."""

    def add(self, step: int, values: Values) -> None:
        """Keep values of a step; what was kept before a run was resumed is not kept again."""
        ...

    def close(self, failed: bool) -> None:
        """Keep what is not yet kept, and end."""
        ...


class Trackers:
    """The loggers of one call of `train`; a context that ends them.

    Args:
        names: Which ones; none is fine.
        tell: Takes a line for the person in front of it.
    """

    def __init__(self, names: Sequence[LoggerName], tell: Tell) -> None:
        self._names, self._tell = list(dict.fromkeys(names)), tell
        self._started: Started | None = None
        self._known = (0, 0)
        self._open: dict[LoggerName, Tracker] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for name, logger in list(self._open.items()):
            self._guard(name, partial(logger.close, failed=kind is not None))
        self._open = {}

    def show(self, event: Event) -> None:
        """Pass on what an event says."""
        if not self._names:
            return
        if isinstance(event, Started):
            self._started = event
            self._known = _sizes(event.run_dir)
        elif self._started is not None:
            # Only now is config.yaml what the run computes with.
            started, self._started = self._started, None
            for name in self._names:
                self._guard(name, partial(self._begin, name, started))
        line = metrics_of(event) or sample_of(event)
        if line is None:
            return
        step, values = _point(line)
        for name, logger in list(self._open.items()):
            self._guard(name, partial(logger.add, step, values))

    def _begin(self, name: LoggerName, started: Started) -> None:
        logger: Tracker | None
        match name:
            case "tensorboard":
                logger = tensor_board = TensorBoard(started)
                since = tensor_board.since
            case "wandb":
                logger = wandb_run = open_wandb(started, self._tell)
                since = wandb_run.told + 1 if wandb_run is not None else 0
        if logger is None:
            return
        self._open[name] = logger
        for step, values in _history(started, self._known, since):
            logger.add(step, values)

    def _guard(self, name: LoggerName, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._open.pop(name, None)
            reason = " ".join(str(error).split()) or type(error).__name__
            self._tell(f"note: {name} disabled after an error; training continues: {reason}")


class TensorBoard:
    """An event file in the run's folder `tensorboard`, which `tensorboard --logdir runs` shows.

    The records are written here and at once, and not by torch's SummaryWriter, whose thread may
    lose the last two minutes and prints a traceback of its own when the disk is full.

    Attributes:
        since: The first step whose values have to be added again.
    """

    def __init__(self, started: Started) -> None:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event = event_pb2.Event
        folder = started.run_dir / "tensorboard"
        atomic.make_folder(folder)
        is_first = not any(folder.glob("events.out.tfevents.*"))
        self.since = 0 if is_first else started.step
        path = folder / f"events.out.tfevents.{time.time_ns() / 1e9:017.6f}.{os.getpid()}"
        self._file = path.open("xb", buffering=0)
        self._records = RecordWriter(self._file)
        self._write(event_pb2.Event(file_version="brain.Event:2"))
        # At each but the first of these marks, TensorBoard drops this step and later ones.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(event_pb2.Event(step=self.since, session_log=start))
        self._write_text("config", started.step, (started.run_dir / CONFIG).read_text())

    def add(self, step: int, values: Values) -> None:
        """Keep values of a step."""
        event = self._event(step=step)
        for tag, value in values.items():
            if isinstance(value, str):
                self._write_text(tag, step, value)
            else:
                event.summary.value.add(tag=tag, simple_value=value)
        if event.HasField("summary"):
            self._write(event)

    def close(self, failed: bool) -> None:
        """Close the file."""
        self._file.close()

    def _write_text(self, tag: str, step: int, text: str) -> None:
        """Keep a text as it is: for TensorBoard, which reads Markdown, it is a block of code."""
        block = "".join(f"    {line}\n" for line in text.splitlines())
        event = self._event(step=step)
        value = event.summary.value.add(tag=tag)
        value.metadata.plugin_data.plugin_name = "text"
        value.tensor.dtype = 7  # a string
        value.tensor.tensor_shape.dim.add(size=1)
        value.tensor.string_val.append(block.encode())
        self._write(event)

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        try:
            self._records.write(event.SerializeToString())
        except OSError:
            self._file.close()
            raise


class WandbRun:
    """A run of Weights & Biases: one row for each step that has values.

    Attributes:
        told: The last step whose row is kept. It is written beside the rows, for offline nobody
            could be asked for it when the run is resumed.
    """

    def __init__(self, run: Any, folder: Path) -> None:
        self._run = run
        self._place = folder / "wandb" / "last_step"
        self._step = self.told = _read_step(self._place)
        self._row: dict[str, float | str] = {}

    def add(self, step: int, values: Values) -> None:
        """Add to the row of a step; it is kept when the next step's row begins."""
        if step <= self.told:
            return
        if step != self._step:
            self._keep()
        self._step = step
        self._row |= values

    def close(self, failed: bool) -> None:
        """Keep the last row and end the run; what is being sent is waited for, two minutes long."""
        self._keep()
        self._run.finish(exit_code=int(failed))

    def _keep(self) -> None:
        if not self._row:
            return
        self._run.log(self._row, step=self._step, commit=True)
        self.told, self._row = self._step, {}
        aside = atomic.aside_name(self._place)
        aside.write_text(f"{self.told}\n")  # not flushed: a row a power cut takes is in no report
        os.replace(aside, self._place)


def open_wandb(started: Started, tell: Tell) -> WandbRun | None:
    """Begin a run of Weights & Biases or go on with it; None if it is switched off.

    Nobody is asked for anything: without an account it is kept in the run's folder `wandb`.
    """
    wandb: Any = importlib.import_module("wandb")
    folder = started.run_dir
    mode = wandb.setup().settings.mode
    if mode == "disabled":
        tell("note: wandb is off: its mode is disabled")
        return None
    if mode == "online" and not wandb.login(prompt=False, verify=False):
        mode = "offline"
    run = wandb.init(
        id=os.environ.get("WANDB_RUN_ID") or _wandb_id(folder),
        name=os.environ.get("WANDB_NAME") or folder.name,
        project=os.environ.get("WANDB_PROJECT") or "gptcli",
        dir=str(folder),
        mode=mode,
        resume="allow" if mode == "online" else None,  # offline there is nobody to ask
        config=_settings(folder),
        settings=wandb.Settings(silent=True, console="off", finish_timeout=120.0),
    )
    kept = folder / "wandb"
    tell(
        f"wandb: {run.url}" if mode == "online"
        else f"wandb: offline, in {kept}; `wandb sync {kept}/offline-run-*` sends it later"
    )  # fmt: skip
    return WandbRun(run, folder)


def _wandb_id(folder: Path) -> str:
    """Return an id that is the run's own for as long as it lives."""
    facts = (folder / RUN).read_bytes() + folder.name.encode()
    return hashlib.sha256(facts).hexdigest()[:16]


def _settings(folder: Path) -> dict[str, Any]:
    from gptcli.config import load_config

    return load_config(str(folder / CONFIG)).model_dump(mode="json")


def _read_step(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return -1


def _sizes(folder: Path) -> tuple[int, int]:
    """Return how long the history is before this process adds to it."""
    found = [path.stat().st_size if path.is_file() else 0 for path in _paths(folder)]
    return found[0], found[1]


def _paths(folder: Path) -> list[Path]:
    return [folder / name for name in _FILES]


def _history(started: Started, sizes: Sequence[int], since: int) -> Iterator[tuple[int, Values]]:
    """Yield what a resumed run had told before, from step `since`, in the order of steps.

    Evaluations and samples of the step that it resumes come again by themselves.
    """
    lines = []
    for path, size in zip(_paths(started.run_dir), sizes, strict=True):
        if size:
            with path.open("rb") as file:
                lines += [json.loads(line) for line in file.read(size).splitlines()]
    lines = [
        line
        for line in lines
        if line["step"] >= since
        and not (line["step"] == started.step and line.keys() & {"val_loss", "text"})
    ]
    return map(_point, sorted(lines, key=lambda line: int(line["step"])))


def _point(line: Mapping[str, Any]) -> tuple[int, Values]:
    """Return the step and the values of a line of metrics.jsonl or samples.jsonl.

    A value keeps the key it has there, behind the group it is drawn in.
    """
    if "text" in line:
        return line["step"], {"sample": f"{line['prompt']}{line['text']}"}
    group = next(group for key, group in _GROUPS.items() if key in line)
    return line["step"], {
        f"{group}/{key}": float(value)
        for key, value in line.items()
        if key not in ("step", "epoch") and value is not None
    }
