"""The environment that torchrun, or another launcher, gives this process; without torch."""

import contextlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from gptcli.errors import ConfigError

_HINT = "start the processes with --gpus N or torchrun, or unset RANK, LOCAL_RANK and WORLD_SIZE"
_MAX = 1 << 20  # processes; more are a mistake


@dataclass(frozen=True)
class Place:
    """Which of the processes of a run this is."""

    rank: int = 0
    local_rank: int = 0  # among the processes of this machine
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0


ALONE = Place()


def place() -> Place:
    """Return the place of this process; a ConfigError if the environment contradicts itself."""
    size = _number("WORLD_SIZE", 1, _MAX) or 1
    rank, local_rank = _number("RANK", 0, size - 1), _number("LOCAL_RANK", 0, size - 1)
    if size > 1:
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not _value(name)]
        if missing:
            raise ConfigError(f"WORLD_SIZE is {size}, but {missing[0]} is not set", _HINT)
        _number("MASTER_PORT", 1, 65535)
    return Place(rank or 0, local_rank or 0, size)


def n_restarts() -> int:
    """Return how often torchrun has restarted this process."""
    return _number("TORCHELASTIC_RESTART_COUNT", 0, _MAX) or 0


def report(message: str, exit_code: int, hint: str | None) -> None:
    """Write the file in which torchrun looks for why a process failed, if torchrun started it."""
    path = _value("TORCHELASTIC_ERROR_FILE")
    if path is None or Path(path).exists():
        return
    about = {"message": message, "errorCode": exit_code, "hint": hint,
             "extraInfo": {"timestamp": str(int(time.time()))}}  # fmt: skip
    with contextlib.suppress(OSError):
        Path(path).write_text(json.dumps({"message": about}))


def _number(name: str, low: int, high: int) -> int | None:
    text = _value(name)
    if text is None:
        return None
    number = int(text) if text.isascii() and text.isdigit() and len(text) < 10 else -1
    if not low <= number <= high:
        what = f"expected an integer from {low} to {high}"
        if name != "WORLD_SIZE" and not _value("WORLD_SIZE"):
            what = "WORLD_SIZE is not set"
        raise ConfigError(f"{name}={text}: {what}", _HINT)
    return number


def _value(name: str) -> str | None:
    return os.environ.get(name) or None
