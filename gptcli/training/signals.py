"""How a run ends before its last step: by signals, by another process that fails, by a hang."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType

from gptcli import atomic
from gptcli.config.schema import Config
from gptcli.distributed.environment import place, report
from gptcli.distributed.process_group import World
from gptcli.errors import (
    EXIT_BUG,
    EXIT_DISTRIBUTED,
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    DistributedError,
    GptError,
)
from gptcli.runs.folder import Run

STACKS = "stacks.txt"


class StopRequest:
    """A request to stop, which signals make and the loop reads between micro-batches."""

    def __init__(self) -> None:
        self.exit_code: int | None = None  # to stop with, once there is a request
        self.world = World()  # the processes that stop together
        self._asked: int | None = None  # this process; a signal may come while the others answer
        self._listen: Callable[[], None] | None = None  # once the processes have met

    def join(self, world: World) -> None:
        """Stop together with the processes of `world`, and listen to their signals from now on."""
        self.world = world
        if self._listen is not None:
            self._listen()

    def requested(self) -> bool:
        """Tell whether any of the processes was asked to stop; a collective call."""
        if self.exit_code is None:
            self.exit_code = self.world.all_reduce_max(self._asked or 0) or None
        return self.exit_code is not None

    def request(self, exit_code: int = EXIT_INTERRUPTED) -> None:
        """Ask, by default as Ctrl-C does."""
        self._asked = self._asked or exit_code

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Let Ctrl-C, SIGTERM and SIGUSR1 ask once; a second signal interrupts at once.

        Several processes never interrupt: one signal may reach them both from a scheduler and from
        torchrun. They listen once they have met (`join`): before, there is nothing to save, and a
        signal ends a process even where it waits in a library.
        """
        codes = {signal.SIGINT: EXIT_INTERRUPTED, signal.SIGTERM: EXIT_PREEMPTED}
        if hasattr(signal, "SIGUSR1"):  # not on Windows
            codes[signal.SIGUSR1] = EXIT_PREEMPTED
        alone = place().size == 1

        def ask(number: int, frame: FrameType | None) -> None:
            if self._asked is not None and alone:
                raise KeyboardInterrupt
            self.request(codes[signal.Signals(number)])

        before = {number: signal.getsignal(number) for number in codes}

        def listen() -> None:
            for number in codes:
                signal.signal(number, ask)

        if alone:
            listen()
        else:
            self._listen = listen
        try:
            yield
        finally:
            self._listen = None
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def ignored_interrupts() -> Iterator[None]:
    """Ignore Ctrl-C: all is saved, and only the result is still to be printed."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def watched(
    world: World, config: Config, stop: StopRequest
) -> contextlib.AbstractContextManager[object]:
    """Watch over a run of several processes during the block; one alone has nobody to wait for.

    A hang ends it with exit code 9, in status.json and log.txt too, with the stack of each process
    in stacks.txt. A process whose parent is gone saves and ends.
    """
    if world.size == 1:
        return contextlib.nullcontext()
    from gptcli.distributed.watchdog import Watchdog

    def on_hang(message: str, stacks: str) -> None:
        run = Run(config.run_folder)
        with contextlib.suppress(GptError, OSError):
            atomic.write_bytes(run.folder / STACKS, stacks.encode())
            run.write_failure(EXIT_DISTRIBUTED, message)
            run.log(f"{message}\n{stacks}")
        hint = f"the stack of each process is in {run.folder / STACKS}; rerun with --resume"
        report(message, EXIT_DISTRIBUTED, hint)
        with contextlib.suppress(OSError):
            os.write(2, f"error: {message}\nhint: {hint}\n".encode())

    seconds = config.train.hang_timeout
    dog = Watchdog(world, seconds, on_hang, on_orphaned=lambda: stop.request(EXIT_PREEMPTED))
    return contextlib.closing(dog)


@contextlib.contextmanager
def propagate_to_peers(world: World) -> Iterator[None]:
    """Let torchrun and the other processes know why this one fails; an error of all is the first's.

    Raises:
        GptError: As the block does; of a process that is gone, its reason.
    """
    try:
        with world.peer_errors():
            if (failure := world.peer_failure()) is not None:  # of those started before
                raise failure
            yield
    except GptError as error:
        report(error.message, error.exit_code, error.hint)
        if not isinstance(error, DistributedError):  # of another process: it may be tried again
            prefix = "" if world.is_main else f"rank {world.rank}: "
            if not world.post_failure(prefix + error.message, error.exit_code, error.hint):
                raise (world.peer_failure() or error) from error
        raise
    except Exception as error:
        report(repr(error), EXIT_BUG, None)
        world.post_failure(repr(error), EXIT_BUG)
        raise
