"""`--gpus N`: torchrun, started for those who do not want to type it.

Its restarts, its store and its signals are torch's own; what is added is that it is quiet, and that
the exit code of the process that failed is not lost.
"""

import contextlib
import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from gptcli.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED, ConfigError

MAX_RESTARTS = 3
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Ended:
    """How the processes ended.

    Attributes:
        exit_code: 0 if all did what they should; None if that is not known.
        message: What the first to fail said, or what befell it.
        is_stopped: Whether they were ended by a signal to the one that started them.
    """

    exit_code: int | None
    message: str = ""
    is_stopped: bool = False


def is_launched() -> bool:
    """Tell whether this process is one of several that torchrun started."""
    return "LOCAL_RANK" in os.environ


def require_devices(n_processes: int, device: str) -> None:
    """Refuse more processes than there are devices for.

    Args:
        n_processes: Wanted.
        device: cpu, cuda or mps.

    Raises:
        ConfigError: With how many there are.
    """
    there = {"cuda": torch.cuda.device_count(), "mps": 1}.get(device, n_processes)
    if n_processes > there:
        raise ConfigError(
            f"--gpus {n_processes}: this machine has {there} of device {device}",
            f"use --gpus {there}, or -s device=cpu",
        )


def launch(arguments: Sequence[str], n_processes: int) -> Ended:
    """Run a command line of this program in several processes of this machine, to their end.

    A process that is killed has them all started again, up to three times. SIGINT, SIGTERM and
    SIGUSR1 are passed on to them.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // n_processes)))
    signals = "SIGTERM,SIGINT" + (",SIGUSR1" if sys.platform != "win32" else "")
    with tempfile.TemporaryDirectory(prefix="gptcli-") as logs, _quiet():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=n_processes,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint=f"{_LOOPBACK}:0",
            local_addr=_LOOPBACK,
            max_restarts=MAX_RESTARTS,
            signals_to_handle=signals,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
        )
        try:
            elastic_launch(config, sys.executable)("-m", "gptcli", *arguments)
        except SignalException as error:
            code = EXIT_INTERRUPTED if error.sigval == signal.SIGINT else EXIT_PREEMPTED
            return Ended(code, f"stopped by {error.sigval.name}", is_stopped=True)
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            said = failure.error_file_data.get("message")
            if isinstance(said, dict) and "errorCode" in said:
                return Ended(said["errorCode"], said["message"])
            return Ended(None, f"rank {rank}: {failure.message.splitlines()[0]}")
    return Ended(0)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torchrun from telling at length what the processes say themselves."""
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict
               if name.startswith("torch.distributed")]  # fmt: skip
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
