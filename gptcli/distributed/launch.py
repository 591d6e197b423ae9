"""`--gpus N`: torchrun without typing it, quiet, and with the exit code of the process that failed.

Restarts, store and signals are torch's own.
"""

import contextlib
import json
import logging
import os
import shutil
import signal
import stat
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from gptcli.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, ConfigError, GptError, StorageError
from gptcli.locking import hold

try:
    import resource
except ImportError:  # on Windows
    resource = None  # type: ignore[assignment]

MAX_RESTARTS = 3
_LOGS = "gptcli-"
_SETTLED = 60  # seconds after which a folder of logs has its lock
_AGAIN = 0.05  # seconds after which a signal that came too early is raised again
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Ended:
    """How the processes ended."""

    exit_code: int | None  # 0 if all succeeded; None if that is not known
    message: str = ""  # what the first to fail reported, or how it ended
    hint: str | None = None
    is_stopped: bool = False  # by a signal to the launcher


def require_devices(n_processes: int, device: str) -> None:
    """Refuse, with a ConfigError, more processes than there are devices (cpu, cuda or mps)."""
    n_devices = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device, n_processes)
    if n_processes > n_devices:
        raise ConfigError(
            f"--gpus {n_processes}: this machine has {n_devices} of device {device}",
            f"use --gpus {n_devices}, or -s device=cpu",
        )


def require_files(n_processes: int) -> None:
    """Refuse, with a StorageError, more processes than the limit of open files allows."""
    if resource is None:
        return
    limit, needed = resource.getrlimit(resource.RLIMIT_NOFILE)[0], 64 + 8 * n_processes
    if 0 <= limit < needed:
        raise StorageError(
            f"--gpus {n_processes}: only {limit} files may be open, and {needed} are needed",
            "raise the limit: ulimit -n 1024",
        )


def launch(arguments: Sequence[str], n_processes: int) -> Ended:
    """Run a command line of this program in several processes of this machine, to their end.

    If one is killed, all are restarted, up to three times. The first SIGINT, SIGTERM or SIGUSR1 is
    passed on to them.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // n_processes)))
    with contextlib.ExitStack() as stack:
        stack.enter_context(_signals(SignalException))
        logs = stack.enter_context(_logs())
        logging.disable()  # of torchrun: the processes say themselves what went wrong
        stack.callback(logging.disable, logging.NOTSET)
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=n_processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint=f"{_LOOPBACK}:0",
            local_addr=_LOOPBACK,
            max_restarts=MAX_RESTARTS,
            signals_to_handle="",
            logs_specs=DefaultLogsSpecs(log_dir=str(logs)),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "gptcli", *arguments)
        except SignalException as error:
            code = EXIT_INTERRUPTED if error.sigval == signal.SIGINT else EXIT_PREEMPTED
            return Ended(code, f"stopped by {error.sigval.name}", is_stopped=True)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            ended = _reported(failure.error_file_data)  # without one, the message is a text
            return ended or Ended(None, f"rank {rank}: {failure.message.splitlines()[0]}")
        attempts = sorted(logs.glob("*/attempt_*"))
        for file in attempts[-1].glob("*/error.json") if attempts else ():
            if (ended := _reported(json.loads(file.read_text()))) is not None:
                return ended
    return Ended(0)


def _reported(content: dict[str, Any]) -> Ended | None:
    """Return what a process reported; None where it is not one of our reports."""
    report = content.get("message")
    if not isinstance(report, dict) or "errorCode" not in report:
        return None
    return Ended(report["errorCode"], report["message"], report.get("hint"))


@contextlib.contextmanager
def _signals(interrupted: Callable[..., Exception]) -> Iterator[None]:
    """Raise torchrun's exception at the first signal, and ignore more of them.

    A second one would end this process while the others are saving. A signal that comes while
    torchrun starts the processes waits until all are started: one that torchrun has forked but not
    yet noted would never be stopped.
    """
    names = ("SIGINT", "SIGTERM", "SIGUSR1")
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]

    def stop(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        if _is_starting(frame):
            signal.signal(number, stop)
            threading.Timer(_AGAIN, signal.raise_signal, [number]).start()
            return
        raise interrupted("", sigval=signal.Signals(number))

    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)


def _is_starting(frame: FrameType | None) -> bool:
    """Tell whether torchrun's agent is starting processes in this frame or one above it."""
    while frame is not None and frame.f_code.co_name != "_start_workers":
        frame = frame.f_back
    return frame is not None


@contextlib.contextmanager
def _logs() -> Iterator[Path]:
    """Make a folder for what the processes report; remove those of launchers that were killed."""
    for old in Path(tempfile.gettempdir()).glob(f"{_LOGS}*"):
        with contextlib.suppress(OSError, GptError):
            status = old.lstat()
            is_ours = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
            if is_ours and time.time() - status.st_mtime > _SETTLED:
                with hold(old, "", ""):
                    shutil.rmtree(old)
    with tempfile.TemporaryDirectory(prefix=_LOGS, ignore_cleanup_errors=True) as folder:
        with hold(Path(folder), "", ""):
            yield Path(folder)
