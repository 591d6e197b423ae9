"""Several processes that are one run, forked from this one, and the store that torchrun keeps."""

import contextlib
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

if not hasattr(os, "fork"):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def compiler() -> None:
    """Import torch's compiler once, before the forks: DDP does, and it takes seconds."""
    importlib.import_module("torch._dynamo")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute with one thread: more of them do not survive a fork."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Ranks:
    """Forked processes with what torchrun tells its own in the environment."""

    def __init__(self, size: int, work: Callable[[int], None], restarts: int, store: int) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.pids = [self._forked(rank, size, work, restarts, store) for rank in range(size)]

    def _forked(
        self, rank: int, size: int, work: Callable[[int], None], restarts: int, store: int
    ) -> int:
        child = os.fork()
        if child:
            return child
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": str(restarts),
            "TORCHELASTIC_ERROR_FILE": str(Path(f"error-{rank}-{restarts}.json").resolve()),
        }  # fmt: skip
        code = 1
        try:
            torch.set_num_threads(1)
            work(rank)
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException as error:
            traceback.print_exc()
            code = getattr(error, "exit_code", 1)
        finally:
            sys.stderr.flush()
            os._exit(code)

    def wait(self, seconds: float = 90) -> list[int]:
        """Return the exit codes, by rank; the negative number of a signal that killed."""
        end = time.monotonic() + seconds
        return [_code(pid, end) for pid in self.pids]


def _code(pid: int, end: float) -> int:
    while (found := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(found[1])


def store_process() -> tuple[int, int]:
    """Keep a store in a process of its own, for its threads would not survive our forks.

    Returns:
        The process id and the port.
    """
    read, write = os.pipe()
    child = os.fork()
    if not child:
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(write, f"{store.port}\n".encode())
        signal.pause()
    os.close(write)
    with os.fdopen(read) as file:
        return child, int(file.readline())


Start = Callable[..., Ranks]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start `work(rank)` in so many processes; `again` counts as torchrun does when it restarts."""
    stores: list[tuple[int, int]] = []
    pids = Path("stores").resolve()

    def begin(size: int, work: Callable[[int], None], again: int = 0) -> Ranks:
        if not again:
            stores.append(store_process())
            with pids.open("a") as file:  # a launcher that is killed cannot end its own
                file.write(f"{stores[-1][0]}\n")
        return Ranks(size, work, again, stores[-1][1])

    yield begin
    for pid in map(int, pids.read_text().split() if pids.exists() else ()):
        os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):  # of such a launcher
            os.waitpid(pid, 0)
