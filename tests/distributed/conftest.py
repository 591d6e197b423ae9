"""Several processes that are one run, forked from this one, and the store that torchrun keeps."""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

if not hasattr(os, "fork"):
    collect_ignore_glob = ["test_*.py"]


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

    def wait(self) -> list[int]:
        """Return the exit codes, by rank; the negative number of a signal that killed."""
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]


Start = Callable[..., Ranks]


@pytest.fixture
def start() -> Start:
    """Start `work(rank)` in so many processes; `again` counts as torchrun does when it restarts."""
    stores = []

    def begin(size: int, work: Callable[[int], None], again: int = 0) -> Ranks:
        if not again:
            stores.append(TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
        return Ranks(size, work, again, stores[-1].port)

    return begin
