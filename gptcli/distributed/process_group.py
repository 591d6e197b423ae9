"""The processes that train one network together, as one of them sees them.

torchrun starts them and names them by rank; a process alone is a world of one, in which nothing is
sent. Rank 0 reads, decides and writes for all. Knows nothing of networks, data or run folders.
"""

import contextlib
import json
import os
import re
import socket
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

# The watchdog judges who hangs, for it knows who is busy; torch's own limit stays out of its way.
_NO_LIMIT = timedelta(days=30)
_POLL = 0.02  # seconds between two looks at the store
_LAST_WORDS = 1.0  # seconds that a process which fails has to say why
_OF_PEERS = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|gloo/transport|remote process exited"
    r"|DistNetworkError",
    re.IGNORECASE,
)


class World:
    """The processes of a run.

    Attributes:
        rank: Which of them this is.
        size: How many there are.
        name: Of this start; no other has it.
        restarts: How often torchrun has started them again.
        marks: How far this process is, on the way that all go: the watchdog compares them.
        moves: Grows whenever this process gets on, with the others or alone.
        is_busy: Whether this process does something that may take any time, such as saving.
    """

    def __init__(
        self, rank: int = 0, size: int = 1, name: str = "", notes: Store | None = None
    ) -> None:
        self.rank, self.size, self.name = rank, size, name
        self.restarts, self.marks, self.moves, self.is_busy = 0, 0, 0, False
        self._notes = notes

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def heartbeat(self) -> None:
        """Say that this process has come to where every other will come, or has been."""
        self.marks += 1
        self.moves += 1

    @contextlib.contextmanager
    def busy(self) -> Iterator[None]:
        """Do something that may take any time without being thought to hang."""
        self.is_busy = True
        try:
            yield
        finally:
            self.is_busy = False
            self.moves += 1

    def all_reduce_max(self, number: int) -> int:
        """Return the largest of the numbers that the ranks give."""
        if self.size == 1:
            return number
        found = torch.tensor(number)
        with self._together():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def all_reduce_sum(self, *numbers: float) -> list[float]:
        """Return the sums over the ranks of the numbers that they give."""
        if self.size == 1:
            return list(numbers)
        found = torch.tensor(numbers, dtype=torch.float64)
        with self._together():
            dist.all_reduce(found)
        sums: list[float] = found.tolist()
        return sums

    def broadcast_object(self, make: Callable[[], Any]) -> Any:
        """Return on every rank what rank 0 makes: something that JSON can say.

        Raises:
            GptError: Whatever rank 0 raised; a `PeerError` with the same exit code elsewhere.
        """
        if self.size == 1:
            return make()
        told: dict[str, Any] = {}
        failure: GptError | None = None
        if self.is_main:
            try:
                with self.busy():
                    told = {"made": make()}
            except GptError as error:
                failure = error
                told = {"error": (error.message, error.exit_code, error.hint)}
        told = json.loads(self._broadcast_text(json.dumps(told)))
        if failure is not None:
            raise failure
        if "error" in told:
            raise PeerError(*told["error"])
        return told["made"]

    def _broadcast_text(self, text: str) -> str:
        content = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        size = torch.tensor(len(content))
        self.broadcast(size)
        if not self.is_main:
            content = torch.empty(int(size), dtype=torch.uint8)
        self.broadcast(content)
        return content.numpy().tobytes().decode()

    def broadcast(self, tensor: Tensor) -> None:
        """Fill a tensor, of one shape and type everywhere, with what it holds on rank 0."""
        if self.size > 1:
            with self._together():
                dist.broadcast(tensor, 0)

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        self.heartbeat()
        with self.peer_errors():
            yield
        self.moves += 1

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
            if self.size == 1 or not _OF_PEERS.search(f"{type(error).__name__} {error}"):
                raise
            raise self._cause(str(error)) from error

    def _cause(self, text: str) -> GptError:
        until = time.monotonic() + _LAST_WORDS
        while time.monotonic() < until:
            if (last_words := self.peer_failure()) is not None:
                return last_words
            time.sleep(0.05)
        gone = [rank for rank in range(self.size) if rank != self.rank and self._is_gone(rank)]
        who = f"rank {', '.join(map(str, gone))}" if gone else "another process of the run"
        return DistributedError(
            f"{who} exited without reporting an error"
            + ("" if gone else f" ({text.splitlines()[0][:120]})"),
            "torchrun restarts all processes if restarts are left; otherwise rerun with --resume",
        )

    def post_failure(self, message: str, exit_code: int, hint: str | None = None) -> bool:
        """Say why the run ends, to the others and to those started in its place.

        Returns:
            Whether this process is the first to; the first word holds.
        """
        if self._notes is not None:
            with contextlib.suppress(RuntimeError):  # the store has gone with its host
                word = json.dumps([message, exit_code, hint, self.rank])
                return self._notes.compare_set("word", "", word).decode() == word
        return True

    def peer_failure(self) -> PeerError | None:
        """Return what a process said as it ended, in this start or one before."""
        with contextlib.suppress(RuntimeError):
            if self._notes is not None and self._notes.check(["word"]):
                message, exit_code, hint, _ = json.loads(self._notes.get("word"))
                return PeerError(message, exit_code, hint)
        return None

    def register(self) -> None:
        """Let the others know which process this is."""
        if self._notes is not None:
            who = json.dumps([socket.gethostname(), os.getpid()])
            self._notes.set(f"{self.name}/who/{self.rank}", who)

    def _is_gone(self, rank: int) -> bool:
        """Tell whether a process of this machine has ended; of others that is not known."""
        with contextlib.suppress(RuntimeError, OSError):
            host, pid = peer_pid(self._notes, self.name, rank) or ("", 0)
            if host == socket.gethostname():
                try:
                    os.kill(pid, 0)
                except ProcessLookupError:
                    return True
        return False


SINGLE_PROCESS = World()
_kept: list[Store] = []


def peer_pid(store: Store | None, start: str, rank: int) -> tuple[str, int] | None:
    """Return the machine and the process id of a rank, if it has said them."""
    key = f"{start}/who/{rank}"
    if store is None or not store.check([key]):
        return None
    host, pid = json.loads(store.get(key))
    return host, pid


def rendezvous_store() -> Store:
    """Return a connection to the store that torchrun keeps for as long as it runs."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(host, port, is_master=False, wait_for_workers=False)
    return PrefixStore("gptcli", store)


@contextlib.contextmanager
def process_group(device: str) -> Iterator[World]:
    """Meet the other processes that the environment speaks of.

    Args:
        device: That of the configuration; with CUDA, each process takes one.

    Raises:
        ConfigError: There are more processes than devices, or the environment contradicts itself.
    """
    here = place()
    if here.size == 1:
        yield World()
        return
    on_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_cuda:
        _require_gpu(here.local_rank)
        torch.cuda.set_device(here.local_rank)
    elif device == "mps" or (device == "auto" and torch.backends.mps.is_available()):
        raise ConfigError("device: there is one mps device for all processes", "set device=cpu")
    backend = "cpu:gloo,cuda:nccl" if on_cuda else "gloo"
    rank, size = here.rank, here.size
    if _must_keep_store(rank):
        _keep_store()
    store = rendezvous_store()
    name = _agreed_name(store, rank, size)
    dist.init_process_group(
        backend, store=PrefixStore(name, store), rank=rank, world_size=size, timeout=_NO_LIMIT
    )
    world = World(rank, size, name, store)
    world.restarts = world.all_reduce_max(n_restarts())  # a node that came later has seen fewer
    world.register()
    yield world
    world.all_reduce_max(0)  # none leaves before all are done, for rank 0 may keep the store
    dist.destroy_process_group()  # after a failure it might wait for those that are gone


def _must_keep_store(rank: int) -> bool:
    """Tell whether there is no torchrun whose store to use, and it falls to this rank."""
    return rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _keep_store() -> None:
    """Keep the store that all ranks talk through, for as long as this process runs."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    _kept.append(TCPStore(host, port, is_master=True, wait_for_workers=False))


def _agreed_name(store: Store, rank: int, size: int) -> str:
    """Agree on a name for this start of the processes.

    torchrun's store outlives them: without a name of its own, a later start would find the
    addresses of the dead there (torch 2.13 does, and cannot connect). So rank 0 proposes a name,
    each rank answers with a number of its own, and one that finds its answer accepted takes it.
    """
    mine = uuid.uuid4().hex
    if rank == 0:
        store.set("name", mine)
        answers = [_awaited(store, f"answer/{other}", mine) for other in range(1, size)]
        store.set("accepted", " ".join([mine, *answers]))
        return mine
    while True:
        name = _read(store, "name")
        store.set(f"answer/{rank}", f"{name}:{mine}")
        if f"{name}:{mine}" in _read(store, "accepted").split():
            return name
        time.sleep(_POLL)


def _awaited(store: Store, key: str, start: str) -> str:
    while not (found := _read(store, key)).startswith(start):
        time.sleep(_POLL)
    return found


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""


def _require_gpu(local_rank: int) -> None:
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"process {local_rank} of this machine has no GPU: there are"
            f" {torch.cuda.device_count()}",
            "start as many processes as there are GPUs",
        )
