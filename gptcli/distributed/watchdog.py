"""A thread in each process that notices when nothing goes on any more, and ends the run.

Every second it tells the others how far its process is. When its own has not moved for too long,
the ranks that are silent or behind the others are those that hang. Knows no run folder: what is to
be written down is for those who start it.
"""

import contextlib
import faulthandler
import json
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from torch._C._distributed_c10d import Store

from gptcli.distributed.process_group import World, peer_pid, rendezvous_store
from gptcli.errors import EXIT_DISTRIBUTED

_PERIOD = 1.0  # seconds between two beats
_SILENCE = 3.5  # seconds without one after which a process is thought to stand still
_GRACE = 3.0  # seconds for the others to notice too and hand in their stacks


@dataclass(frozen=True)
class Hang:
    """What was found when nothing went on any more.

    Attributes:
        message: Which ranks hang, as far as that can be told.
        stacks: Where each process stood that could still say it.
    """

    message: str
    stacks: str


@dataclass(frozen=True)
class _Beat:
    number: int
    marks: int
    is_busy: bool


class Watchdog:
    """Watches over this process, and with those of the others over the run."""

    def __init__(
        self,
        world: World,
        seconds: float,
        on_hang: Callable[[Hang], None],
        on_orphaned: Callable[[], None],
    ) -> None:
        """Begin to watch; a world of one has nobody to wait for.

        Args:
            world: Whose `moves` say that this process gets on.
            seconds: Without any before the run is ended with exit code 9.
            on_hang: Called in one of the processes before they end.
            on_orphaned: Called when whoever started this process is gone.
        """
        self._world, self._seconds = world, seconds
        self._on_hang, self._on_orphaned = on_hang, on_orphaned
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if world.size > 1:
            self._thread.start()

    def close(self) -> None:
        """Watch no longer."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        world, parent = self._world, os.getppid()
        with contextlib.suppress(RuntimeError):  # the store has gone, and the run goes too
            self._store = rendezvous_store()
            moved, moves, number = time.monotonic(), world.moves, 0
            while not self._ended.wait(_PERIOD):
                number += 1
                beat = json.dumps([number, world.marks, world.is_busy])
                self._store.set(self._key("beat", world.rank), beat)
                if os.getppid() != parent:
                    self._on_orphaned()
                if world.moves != moves or world.is_busy:
                    moved, moves = time.monotonic(), world.moves
                elif time.monotonic() - moved > self._seconds:
                    self._judge()
                    moved = time.monotonic()

    def _key(self, kind: str, rank: int) -> str:
        return f"{self._world.name}/{kind}/{rank}"

    def _judge(self) -> None:
        """End the run, unless one of the processes is rightly waited for."""
        world = self._world
        before = self._beats()
        number = before[world.rank].number if world.rank in before else 0
        self._store.set(self._key("stack", world.rank), _stacks())
        end = time.monotonic() + _SILENCE
        while time.monotonic() < end:  # go on telling the others that this process lives
            time.sleep(_PERIOD / 2)
            number += 1
            beat = json.dumps([number, world.marks, world.is_busy])
            self._store.set(self._key("beat", world.rank), beat)
        after = self._beats()
        silent = [rank for rank in range(world.size) if before.get(rank) == after.get(rank)]
        alive = [rank for rank in after if rank not in silent]
        if any(after[rank].is_busy for rank in alive) or world.marks != after[world.rank].marks:
            return
        furthest = max(after[rank].marks for rank in alive)
        hanging = silent or [rank for rank in alive if after[rank].marks < furthest]
        waiting = [rank for rank in alive if rank not in hanging]
        speaker = min(waiting or alive)
        if world.rank == speaker:
            self._speak(hanging)
        else:
            time.sleep(2 * _GRACE)
        os._exit(EXIT_DISTRIBUTED)

    def _speak(self, hanging: list[int]) -> None:
        world = self._world
        time.sleep(_GRACE)
        ranks = ", ".join(map(str, hanging)) or "every rank"
        message = (
            f"rank {ranks} made no progress for {self._seconds:.0f} s; the others are waiting"
            if hanging
            else f"no rank got on for {self._seconds:.0f} s"
        )
        world.post_failure(message, EXIT_DISTRIBUTED)
        self._on_hang(Hang(message, self._all_stacks()))
        for rank in hanging:
            found = peer_pid(self._store, world.name, rank)
            # torchrun would first ask it to end, and wait half a minute.
            if found is not None and found[0] == socket.gethostname() and rank != world.rank:
                with contextlib.suppress(OSError):
                    os.kill(found[1], signal.SIGKILL if hasattr(signal, "SIGKILL") else 9)

    def _beats(self) -> dict[int, _Beat]:
        found = {}
        for rank in range(self._world.size):
            if self._store.check([self._key("beat", rank)]):
                found[rank] = _Beat(*json.loads(self._store.get(self._key("beat", rank))))
        return found

    def _all_stacks(self) -> str:
        texts = []
        for rank in range(self._world.size):
            key = self._key("stack", rank)
            said = self._store.get(key).decode() if self._store.check([key]) else "(silent)\n"
            texts.append(f"rank {rank}:\n{said}")
        return "\n".join(texts)

    _store: Store


def _stacks() -> str:
    """Return where each thread of this process stands."""
    with tempfile.TemporaryFile() as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace")
