"""TensorBoard and Weights & Biases: they receive what metrics.jsonl and samples.jsonl hold.

Off unless `train.loggers` names them. An error in a tracker ends that tracker, never the run.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

from gptcli import atomic
from gptcli.config.schema import LoggerName
from gptcli.errors import ConfigError
from gptcli.runs import CONFIG, METRICS, RUN, SAMPLES
from gptcli.training.events import Event, Started, StepDone

Values = Mapping[str, float | str]


def require(names: Sequence[LoggerName]) -> None:
    """Raise ConfigError for a tracker whose package is not installed."""
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a folder of that name is no package
            hint = f"pip install 'gptcli[{name}]'"
            raise ConfigError(f"train.loggers: {name} is not installed", hint)


class Trackers(AbstractContextManager["Trackers"]):
    """The trackers of one call of `train`; a context that closes them."""

    def __init__(self, names: Sequence[LoggerName], notify: Callable[[str], None]) -> None:
        """Open nothing yet; `notify` takes a line for the user."""
        self._names, self._notify = list(dict.fromkeys(names)), notify
        self._started: Started | None = None
        self._read = {METRICS: 0, SAMPLES: 0}  # bytes that were passed on
        self._open: dict[LoggerName, TensorBoard | WandbRun] = {}

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pass_on()
        for name, tracker in list(self._open.items()):
            self._guard(name, partial(tracker.close, failed=kind is not None))
        self._open = {}

    def show(self, event: Event) -> None:
        """Pass on what the run folder has recorded, at each logged step.

        An evaluation before the first step is one that a resumed run repeats, and that replaces a
        line of the files.
        """
        if isinstance(event, Started):
            self._started = event
        elif isinstance(event, StepDone) and event.logged:
            self._pass_on()

    def _pass_on(self) -> None:
        if self._started is None:
            return
        names, self._names = self._names, []
        for name in names:  # not at Started: only now is config.yaml what the run computes with
            self._guard(name, partial(self._begin, name, self._started))
        points = self._new_points(self._started.run_dir) if self._open else []
        for name, tracker in list(self._open.items()):
            self._guard(name, partial(_add_all, tracker, points))

    def _begin(self, name: LoggerName, started: Started) -> None:
        is_wandb = name == "wandb"
        tracker = open_wandb(started, self._notify) if is_wandb else TensorBoard(started)
        if tracker is not None:
            self._open[name] = tracker

    def _new_points(self, folder: Path) -> list[tuple[int, Values]]:
        """Return what the run's files hold beyond what was read, in the order of steps."""
        points = []
        for name in self._read:
            with contextlib.suppress(OSError), (folder / name).open("rb") as file:
                file.seek(self._read[name])
                content = file.read()
                self._read[name] += len(content)
                points += [_point(json.loads(line)) for line in content.splitlines()]
        return sorted(points, key=itemgetter(0))

    def _guard(self, name: LoggerName, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._open.pop(name, None)
            reason = " ".join(str(error).split()) or type(error).__name__
            self._notify(f"note: {name} disabled after an error; training continues: {reason}")


def _add_all(tracker: "TensorBoard | WandbRun", points: Sequence[tuple[int, Values]]) -> None:
    for step, values in points:
        if step >= tracker.since:
            tracker.add(step, values)


class TensorBoard:
    """An event file in the run's folder `tensorboard`, which `tensorboard --logdir runs` shows.

    Events are written here, at once: the thread of torch's SummaryWriter prints a traceback when
    the disk is full, and loses what it has not flushed when the process is killed. `since` is the
    first step whose values have to be added again.
    """

    def __init__(self, started: Started) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard import summary

        self._make_event, self._summary = Event, summary  # type: Any, Any
        folder = started.run_dir / "tensorboard"
        atomic.make_folder(folder)
        self.since = started.step if any(folder.glob("events.out.tfevents.*")) else 0
        path = folder / f"events.out.tfevents.{time.time_ns() / 1e9:017.6f}.{os.getpid()}"
        self._file = path.open("xb", buffering=0)
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        # At each of these but the first, TensorBoard drops this step and later ones.
        self._write(step=self.since, session_log=SessionLog(status=SessionLog.START))
        self.add(started.step, {"config": (started.run_dir / CONFIG).read_text()})

    def add(self, step: int, values: Values) -> None:
        """Keep values of a step."""
        for tag, value in values.items():
            if isinstance(value, str):
                # TensorBoard reads Markdown: as a block of code, text stays as it is.
                block = "".join(f"    {line}\n" for line in value.splitlines())
                summary = self._summary.text(tag, block)
                summary.value[0].tag = tag
            else:
                summary = self._summary.scalar(tag, value)
            self._write(step=step, summary=summary)

    def close(self, failed: bool) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, **fields: Any) -> None:
        try:
            event = self._make_event(wall_time=time.time(), **fields)
            self._records.write(event.SerializeToString())
        except OSError:
            self._file.close()
            raise


class WandbRun:
    """A run of Weights & Biases: one row for each step that has values.

    `since` is the first step whose row is not yet kept. It is written beside the rows, because
    offline no server can be asked for it when the run is resumed.
    """

    def __init__(self, run: Any, folder: Path) -> None:
        self._run, self._path = run, folder / "wandb" / "last_step"
        try:
            self._step = int(self._path.read_text())
        except (OSError, ValueError):
            self._step = -1
        self.since = self._step + 1
        self._row: dict[str, float | str] = {}

    def add(self, step: int, values: Values) -> None:
        """Add to the row of a step; it is kept when the next step's row begins."""
        if step != self._step:
            self._keep()
        self._step = step
        self._row |= values

    def close(self, failed: bool) -> None:
        """Keep the last row and end the run, which waits for uploads for two minutes at most."""
        self._keep()
        self._run.finish(exit_code=int(failed))

    def _keep(self) -> None:
        if not self._row:
            return
        self._run.log(self._row, step=self._step, commit=True)
        self.since, self._row = self._step + 1, {}
        aside = atomic.aside_name(self._path)
        aside.write_text(f"{self._step}\n")  # not synced: a power cut takes the row as well
        os.replace(aside, self._path)


def open_wandb(started: Started, notify: Callable[[str], None]) -> WandbRun | None:
    """Start or resume a run of Weights & Biases; None if it is switched off.

    It never asks for anything: without an account, the run is kept in the run's folder `wandb`.
    """
    from gptcli.config import load_config

    wandb: Any = importlib.import_module("wandb")
    folder = started.run_dir
    mode = wandb.setup().settings.mode
    if mode == "disabled":
        notify("note: wandb is off: its mode is disabled")
        return None
    if mode == "online" and not wandb.login(prompt=False, verify=False):
        mode = "offline"
    facts = (folder / RUN).read_bytes() + folder.name.encode()  # the same for all of the run's life
    run = wandb.init(
        id=os.environ.get("WANDB_RUN_ID") or hashlib.sha256(facts).hexdigest()[:16],
        name=os.environ.get("WANDB_NAME") or folder.name,
        project=os.environ.get("WANDB_PROJECT") or "gptcli",
        dir=str(folder),
        mode=mode,
        resume="allow" if mode == "online" else None,  # offline there is no server to ask
        config=load_config(str(folder / CONFIG)).model_dump(mode="json"),
        settings=wandb.Settings(silent=True, console="off", finish_timeout=120.0),
    )
    kept = folder / "wandb"
    sync = f"offline, in {kept}; `wandb sync {kept}/offline-run-*` sends it later"
    notify(f"wandb: {run.url if mode == 'online' else sync}")
    return WandbRun(run, folder)


def _point(line: Mapping[str, Any]) -> tuple[int, Values]:
    """Return the step and the values of a line, each value behind the group it is drawn in."""
    if "text" in line:
        return line["step"], {"sample": f"{line['prompt']}{line['text']}"}
    group = "eval" if "val_loss" in line else "epoch" if "epoch" in line else "train"
    of_sources = {f"{name}/{key}": value for name, losses in line.get("sources", {}).items()
                  for key, value in losses.items()}  # fmt: skip
    return line["step"], {
        f"{group}/{key}": float(value)
        for key, value in {**line, **of_sources}.items()
        if key not in ("step", "epoch", "sources") and value is not None
    }
