"""The processes that train one model together, as one of them sees them.

torchrun starts them and numbers them by rank; a single process is a world of one, in which nothing
is sent. Rank 0 reads, decides and writes for all. Knows nothing of models, data or run folders.
"""

import contextlib
import json
import os
import re
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from gptcli.distributed.environment import n_restarts, place
from gptcli.errors import ConfigError, DistributedError, GptError, PeerError

# The watchdog decides who hangs, because it knows who is busy; torch's own limit is out of reach.
_NO_LIMIT = timedelta(days=30)
_POLL_SECONDS = 0.02
_NOTICE_SECONDS = 30.0  # of waiting for the other processes, before a line says so
_CONNECT_SECONDS = 300.0  # of waiting for the store
_REPORT_SECONDS = 1.0  # that a process which fails has to say why
_START_ALL = "start all processes again, with the same MASTER_ADDR and MASTER_PORT"
_PEER_IS_GONE = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|gloo/transport|remote process exited"
    r"|DistNetworkError",
    re.IGNORECASE,
)


class World:
    """The processes of a run: how many there are (`size`), and which of them this is (`rank`)."""

    def __init__(
        self, rank: int = 0, size: int = 1, name: str = "", store: Store | None = None
    ) -> None:
        self.rank, self.size = rank, size
        self.name = name  # of this start; no other start has it
        self.restarts = 0  # by torchrun
        self.position = 0  # of this process, in points that every process passes
        self.progress = 0  # grows whenever this process gets something done, together or alone
        self.is_busy = False  # with something that may take any time, such as saving
        self._store = store

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return self.rank == 0

    def heartbeat(self) -> None:
        """Note that this process has reached a point that every process passes."""
        self.position += 1
        self.progress += 1

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Do something that may take any time without being taken for a hang."""
        self.is_busy = True
        try:
            yield
        finally:
            self.is_busy = False
            self.progress += 1

    def all_reduce_max(self, number: int) -> int:
        """Return the largest of the ranks' numbers."""
        if self.size == 1:
            return number
        tensor = torch.tensor(number)
        with self._collective():
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def all_reduce_sum(self, *numbers: float) -> list[float]:
        """Return the sums of the ranks' numbers."""
        if self.size == 1:
            return list(numbers)
        tensor = torch.tensor(numbers, dtype=torch.float64)
        with self._collective():
            dist.all_reduce(tensor)
        sums: list[float] = tensor.tolist()
        return sums

    def broadcast(self, tensor: Tensor) -> None:
        """Fill a tensor, of one shape and type everywhere, with what it holds on rank 0."""
        if self.size > 1:
            with self._collective():
                dist.broadcast(tensor, 0)

    def broadcast_object(self, make: Callable[[], Any]) -> Any:
        """Return on every rank what `make` returns on rank 0, in JSON's types.

        Raises:
            GptError: Whatever rank 0 raised; a `PeerError` with the same exit code elsewhere.
        """
        if self.size == 1:
            return make()
        text, failure = "", None
        if self.is_main:
            try:
                with self.busy():
                    text = json.dumps({"made": make()})
            except GptError as error:
                failure = error
                text = json.dumps({"error": [error.message, error.exit_code, error.hint]})
        n_bytes = torch.tensor(len(text.encode()))
        self.broadcast(n_bytes)
        raw = bytearray(text.encode()) if self.is_main else bytearray(int(n_bytes))
        self.broadcast(torch.frombuffer(raw, dtype=torch.uint8))  # which shares its memory
        if failure is not None:
            raise failure
        content = json.loads(raw)
        if "error" in content:
            raise PeerError(*content["error"])
        return content["made"]

    @contextlib.contextmanager
    def _collective(self) -> Iterator[None]:
        self.heartbeat()
        with self.peer_errors():
            yield
        self.progress += 1

    @contextlib.contextmanager
    def peer_errors(self) -> Iterator[None]:
        """Turn what torch says when another process is gone into who that is, and why.

        Raises:
            PeerError: The other process said why it failed.
            DistributedError: It did not.
        """
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not _PEER_IS_GONE.search(f"{type(error).__name__} {error}"):
                raise
            raise self._cause(str(error).splitlines()[0][:120]) from error

    def _cause(self, reason: str) -> GptError:
        until = time.monotonic() + _REPORT_SECONDS
        while time.monotonic() < until:
            if (failure := self.peer_failure()) is not None:
                return failure
            time.sleep(0.05)
        gone = [str(rank) for rank in range(self.size) if rank != self.rank and self._is_gone(rank)]
        who = f"rank {', '.join(gone)}" if gone else "another process of the run"
        return DistributedError(
            f"{who} exited without reporting an error" + ("" if gone else f" ({reason})"),
            "torchrun restarts all processes if restarts are left; otherwise rerun with --resume",
        )

    def post_failure(self, message: str, exit_code: int, hint: str | None = None) -> bool:
        """Tell all, those of later starts too, why the run ends; False if another process has."""
        if self._store is not None:
            with contextlib.suppress(RuntimeError):  # the store has gone with its host
                report = json.dumps([message, exit_code, hint, self.rank])
                return self._store.compare_set("failure", "", report).decode() == report
        return True

    def peer_failure(self) -> PeerError | None:
        """Return what a process reported as it ended, in this start or one before."""
        with contextlib.suppress(RuntimeError):
            if self._store is not None and (report := _read(self._store, "failure")):
                message, exit_code, hint, _ = json.loads(report)
                return PeerError(message, exit_code, hint)
        return None

    def _is_gone(self, rank: int) -> bool:
        """Tell whether a process of this machine has ended; of others that is not known."""
        with contextlib.suppress(RuntimeError, OSError):
            if (pid := local_pid(self._store, self.name, rank)) is not None:
                try:
                    os.kill(pid, 0)
                except ProcessLookupError:
                    return True
        return False


SINGLE_PROCESS = World()
_kept: list[object] = []  # for as long as this process runs


def local_pid(store: Store | None, start: str, rank: int) -> int | None:
    """Return the process id of a rank of this start, if it runs on this machine."""
    host, _, pid = _read(store, f"{start}/pid/{rank}").rpartition(" ") if store else ("", "", "")
    return int(pid) if pid and host == socket.gethostname() else None


def rendezvous_store(is_kept_here: bool = False) -> Store:
    """Return a connection to the store that torchrun, or else rank 0, keeps."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if is_kept_here:
        _kept.append(TCPStore(host, port, is_master=True, wait_for_workers=False))
    limit = timedelta(seconds=_NOTICE_SECONDS)
    for seconds in _waiting(lambda: f"for rank 0 at {host}:{port}"):
        try:
            store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=limit)
        except RuntimeError as error:
            if seconds > _CONNECT_SECONDS:
                message = f"no process answers at {host}:{port}"
                raise DistributedError(message, _START_ALL) from error
        else:
            store.set_timeout(timedelta(seconds=_CONNECT_SECONDS))
            return PrefixStore("gptcli", store)
    raise AssertionError("waiting ends in a store or an error")


def _waiting(missing: Callable[[], str]) -> Iterator[float]:
    """Yield the seconds waited for other processes to start, as long as the launcher is there."""
    began, parent, is_noted = time.monotonic(), os.getppid(), False
    while True:
        seconds = time.monotonic() - began
        yield seconds
        if os.getppid() != parent:
            raise DistributedError("the launcher of this process is gone", _START_ALL)
        if seconds >= _NOTICE_SECONDS and not is_noted:
            is_noted = True
            if names := missing():  # empty where another process says so
                sys.stderr.write(f"waiting {names} to start\n")
                sys.stderr.flush()
        time.sleep(_POLL_SECONDS)


@contextlib.contextmanager
def process_group(device: str) -> Iterator[World]:
    """Connect to the other processes that the environment names; each takes its GPU, if any.

    Raises:
        ConfigError: There are more processes than devices, or the environment contradicts itself.
        DistributedError: The launcher, or the process that keeps the store, is gone.
    """
    here = place()
    if here.size == 1:
        yield World()
        return
    has_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    on_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_cuda:
        n_gpus = torch.cuda.device_count()
        # Some launchers show each process one GPU, its own; torchrun shows all of them to all.
        gpu = here.local_rank if has_torchrun or n_gpus > 1 else 0
        if gpu >= n_gpus:
            raise ConfigError(
                f"process {here.local_rank} of this machine has no GPU: there are {n_gpus}",
                "start as many processes as there are GPUs",
            )
        torch.cuda.set_device(gpu)
    elif device == "mps" or (device == "auto" and torch.backends.mps.is_available()):
        raise ConfigError("device: there is one mps device for all processes", "set device=cpu")
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    store = rendezvous_store(is_kept_here=here.is_main and not has_torchrun)
    try:
        name = _agreed_name(store, here.rank, here.size)
    except RuntimeError as error:
        raise DistributedError("the process that keeps the store is gone", _START_ALL) from error
    dist.init_process_group(
        backend,
        store=PrefixStore(name, store),
        rank=here.rank,
        world_size=here.size,
        timeout=_NO_LIMIT,
    )
    world = World(here.rank, here.size, name, store)
    world.restarts = world.all_reduce_max(n_restarts())  # a node that came later has seen fewer
    store.set(f"{name}/pid/{here.rank}", f"{socket.gethostname()} {os.getpid()}")
    yield world
    world.all_reduce_max(0)  # none leaves before all are done, for rank 0 may keep the store
    # Freed by DDP, whose reducer has it too, it would keep the GIL while it waits for a thread that
    # may be waiting for the GIL (pytorch issue 56297). Freed by Python, it lets go of it.
    _kept.append(dist.group.WORLD)
    dist.destroy_process_group()  # after a failure it might wait for those that are gone


def _agreed_name(store: Store, rank: int, size: int) -> str:
    """Agree on a name for this start of the processes.

    torchrun's store outlives them: without a name for each start, a later one would find the
    addresses of the dead there (torch 2.13 does, and cannot connect). So rank 0 proposes a name,
    each rank answers with a number that only it has, and takes the name once that is accepted.
    """
    mine = uuid.uuid4().hex

    def answers() -> list[str]:
        return [_read(store, f"answer/{other}") for other in range(1, size)]

    def missing() -> str:
        name = _read(store, "name")
        answered = (r for r, text in enumerate(answers(), 1) if text.startswith(f"{name}:"))
        present = {rank, *answered}
        if name and not present.issuperset(range(1, size)):
            present.add(0)  # which would have accepted the answers of all
        if rank > min(present):
            return ""  # the lowest rank that is there says it for all
        return f"for rank {', '.join(str(r) for r in range(size) if r not in present)}"

    if rank == 0:
        store.set("name", mine)
    for _ in _waiting(missing):
        if rank == 0:
            answered = answers()
            if all(answer.startswith(mine) for answer in answered):
                store.set("accepted", " ".join(answered))
                return mine
            continue
        name = _read(store, "name")
        answer = f"{name}:{mine}"
        store.set(f"answer/{rank}", answer)
        if answer in _read(store, "accepted").split():
            return name
    raise AssertionError("waiting ends in a name or an error")


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""
