"""Training runs: what `gpt train` calls, and `gptcli.train` is."""

import logging
import threading
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path, PurePosixPath

from gptcli import trackers
from gptcli.api.prepare import OnBytes, prepare
from gptcli.config import Config
from gptcli.data.loader import part_configs
from gptcli.data.presets import data_dir, is_address, is_local
from gptcli.data.shards import MANIFEST
from gptcli.distributed.environment import place
from gptcli.errors import EXIT_INTERRUPTED, ConfigError, DataError
from gptcli.plotting.figure import leave_picture
from gptcli.training.events import Event, Finished, Stopped, Summary
from gptcli.training.loop import train as train_events
from gptcli.training.signals import StopRequest

_log = logging.getLogger("gptcli")


def ready(
    config: Config,
    *,
    resume: bool = False,
    overwrite: bool = False,
    workers: int | None = 1,
    command: str = "gptcli.prepare(config)",
    on_bytes: OnBytes = lambda kind, n_bytes, total: None,
) -> Config:
    """Return a configuration that `train` can start from: named, and its data prepared.

    Text on this machine is prepared here; a download stays a deliberate act.
    A run without a name gets that of its data. Errors name `command` as what prepares the data.

    Raises:
        GptError: The options contradict each other, or there is no data.
    """
    if resume and overwrite:
        raise ConfigError("resume continues a run and overwrite starts over: use one of them")
    trackers.require(config.train.loggers)
    name = "mix" if config.data.mix is not None else data_dir(config.data).name
    if not config.run_dir and not config.name:
        if is_address(config.data.dir):
            name = PurePosixPath(str(config.data.dir)).name
        config = config.model_copy(update={"name": name or "run"})
    if place().is_main:
        for each in part_configs(config):
            _require_data(each, workers, command, on_bytes)
    return config


def _require_data(config: Config, workers: int | None, command: str, on_bytes: OnBytes) -> None:
    """Prepare the data of a run, or of one of its sources, if that is on this machine."""
    data, folder = config.data, data_dir(config.data)
    if is_address(data.dir) or (folder / MANIFEST).exists():
        return
    if not is_local(data):
        state = "is not prepared" if folder.is_dir() else "does not exist"
        hint = f"name the data to prepare: `{command} DATASET`"
        if data.source is not None:
            hint = f"download and prepare it: `{command}`; train prepares text on this machine only"
        raise DataError(f"{folder}: this data folder {state}", hint)
    source = data.source
    what = source if isinstance(source, str | None) else f"{source.train} and {source.val}"
    _log.info(f"{folder} does not exist yet: preparing {what}")
    tokens = prepare(config, workers=workers, on_bytes=on_bytes).manifest.tokens
    _log.info(f"{tokens.train:,} training tokens")


class Training:
    """A run in progress: an iterable of its events, which can be iterated once.

    The run advances as its events are requested. A loop that is left early releases the run folder
    when `close` is called or the object is forgotten; what was saved until then can be resumed.

    Attributes:
        summary: The result; None before the last event.
    """

    def __init__(self, config: Config, *, resume: bool, overwrite: bool) -> None:
        self.summary: Summary | None = None
        self._stop, self._is_asked = StopRequest(), False
        self._events = self._run(config, resume, overwrite)

    def __iter__(self) -> Iterator[Event]:
        return self._events

    @property
    def exit_code(self) -> int | None:
        """The exit code of the signal that stopped the run; None without one."""
        return None if self._is_asked else self._stop.exit_code

    def stop(self) -> None:
        """Ask the run to save its state and end; its last event is then `Stopped`."""
        self._is_asked = True
        self._stop.request()

    def on_signals(self) -> AbstractContextManager[None]:
        """Return a context in which Ctrl-C, SIGTERM and SIGUSR1 stop the run as `stop` does.

        Signals reach the main thread alone; in others nothing changes.
        """
        in_main = threading.current_thread() is threading.main_thread()
        return self._stop.on_signals() if in_main else nullcontext()

    def close(self) -> None:
        """End at once, without saving."""
        self._events.close()

    def finish(self) -> Summary:
        """Train to the end and return the result.

        Raises:
            GptError: Every kind that a user can cause; what is saved stays usable.
            KeyboardInterrupt: Ctrl-C, or the notebook's stop button; the state is saved.
            SystemExit: SIGTERM or SIGUSR1; the state is saved.
        """
        with self.on_signals():
            for _ in self:
                pass
        if self.exit_code is not None:
            raise (
                KeyboardInterrupt
                if self.exit_code == EXIT_INTERRUPTED
                else SystemExit(self.exit_code)
            )
        assert self.summary is not None, "this run was iterated before"
        return self.summary

    def _run(self, config: Config, resume: bool, overwrite: bool) -> Generator[Event]:
        is_main = place().is_main
        with trackers.Trackers(config.train.loggers if is_main else [], _log.info) as curves:
            for event in train_events(config, resume=resume, overwrite=overwrite, stop=self._stop):
                curves.show(event)
                if isinstance(event, Finished | Stopped):
                    self.summary = event.summary
                yield event
        if is_main and isinstance(event, Finished) and event.spent:
            if (why_not := leave_picture(Path(event.summary.run_dir))) is not None:
                _log.info(f"note: {why_not}")


def train(config: Config, *, resume: bool = False, overwrite: bool = False) -> Training:
    """Train a model: `for event in train(config)`, or `train(config).finish()`.

    Text on this machine is prepared if it is not yet. `resume` continues from the newest checkpoint
    that verifies; `overwrite` renames an existing run in the folder and starts over.

    Raises:
        GptError: The configuration does not allow it; what comes to light later, the events raise.
    """
    if not isinstance(config, Config):
        raise ConfigError(
            f"train takes a Config, not a {type(config).__name__}", "train(load_config('run.yaml'))"
        )
    config = ready(config, resume=resume, overwrite=overwrite)
    return Training(config, resume=resume, overwrite=overwrite)
