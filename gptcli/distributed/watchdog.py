"""A thread in each process that notices when a run no longer makes progress, and ends it.

Every second it posts how far its process is. When its own process has made no progress for too
long, the ranks that are silent or behind the others are those that hang. Knows no run folder.
"""

import contextlib
import faulthandler
import json
import os
import tempfile
import threading
import time
from collections.abc import Callable

from torch._C._distributed_c10d import Store

from gptcli.distributed.process_group import World, local_pid, rendezvous_store
from gptcli.errors import EXIT_DISTRIBUTED, DistributedError

_PERIOD = 1.0  # seconds between two heartbeats
_SILENCE = 3.5  # seconds without a heartbeat after which a process counts as stuck
_GRACE = 3.0  # seconds for the others to notice too and post their stacks


class Watchdog:
    """Watches this process, and with those of the others the run."""

    def __init__(
        self,
        world: World,
        seconds: float,
        on_hang: Callable[[str, str], None],
        on_orphaned: Callable[[], None],
    ) -> None:
        """Start to watch.

        The run ends with exit code 9 after so many seconds without progress. One of the processes
        calls `on_hang` before they end, with which ranks hang as far as that is known, and the
        stacks of those that are alive; `on_orphaned` is called when this one's parent is gone.
        """
        self._world, self._seconds = world, seconds
        self._on_hang, self._on_orphaned = on_hang, on_orphaned
        self._n_beats = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Watch no longer."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        world, parent = self._world, os.getppid()
        # Without the store the run ends too, and the main thread says why.
        with contextlib.suppress(RuntimeError, DistributedError):
            self._store: Store = rendezvous_store()
            since, progress = time.monotonic(), world.progress
            while not self._ended.wait(_PERIOD):
                self._beat()
                if os.getppid() != parent:
                    self._on_orphaned()
                if world.progress != progress or world.is_busy:
                    since, progress = time.monotonic(), world.progress
                elif time.monotonic() - since > self._seconds:
                    self._judge()
                    since = time.monotonic()

    def _beat(self) -> None:
        self._n_beats += 1
        self._post("beat", json.dumps([self._n_beats, self._world.position, self._world.is_busy]))

    def _post(self, kind: str, text: str) -> None:
        self._store.set(f"{self._world.name}/{kind}/{self._world.rank}", text)

    def _posted(self, kind: str) -> dict[int, str]:
        """Return what the ranks have posted."""
        keys = {rank: f"{self._world.name}/{kind}/{rank}" for rank in range(self._world.size)}
        return {rank: self._store.get(key).decode()
                for rank, key in keys.items() if self._store.check([key])}  # fmt: skip

    def _judge(self) -> None:
        """End the run, unless the others are right to wait for one of the processes."""
        world, before = self._world, self._posted("beat")
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            self._post("stack", file.read().decode(errors="replace"))
        end = time.monotonic() + _SILENCE
        while time.monotonic() < end:  # the others must see that this process is alive
            time.sleep(_PERIOD / 2)
            self._beat()
        after = self._posted("beat")
        silent = [rank for rank in range(world.size) if before.get(rank) == after.get(rank)]
        alive = {rank: json.loads(after[rank]) for rank in after if rank not in silent}
        positions = {rank: position for rank, (_, position, _) in alive.items()}
        if any(is_busy for _, _, is_busy in alive.values()):
            return
        if world.position != positions[world.rank]:
            return
        furthest = max(positions.values())
        hanging = silent or [rank for rank in alive if positions[rank] < furthest]
        waiting = [rank for rank in alive if rank not in hanging]
        if world.rank == min(waiting or alive):
            self._report(hanging)
        else:
            time.sleep(2 * _GRACE)
        os._exit(EXIT_DISTRIBUTED)

    def _report(self, hanging: list[int]) -> None:
        """Say which ranks hang, with the stacks of all, and kill those that hang here."""
        world = self._world
        time.sleep(_GRACE)
        message = f"no rank made progress for {self._seconds:.0f} s"
        if hanging:
            ranks = ", ".join(map(str, hanging))
            message = f"rank {ranks} made no progress for {self._seconds:.0f} s"
            message += "; the others are waiting"
        world.post_failure(message, EXIT_DISTRIBUTED)
        stacks = self._posted("stack")
        texts = [stacks.get(rank, "(silent)\n") for rank in range(world.size)]
        texts = [f"rank {rank}:\n{text}" for rank, text in enumerate(texts)]
        self._on_hang(message, "\n".join(texts))
        for rank in hanging:
            pid = local_pid(self._store, world.name, rank)
            # torchrun would first ask it to end, and wait half a minute.
            if pid is not None and rank != world.rank:
                with contextlib.suppress(OSError):
                    os.kill(pid, 9)
