"""Being asked to stop: a flag that signals set and the loop reads between micro-batches."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

from gptcli.distributed.environment import place
from gptcli.distributed.process_group import World
from gptcli.errors import EXIT_INTERRUPTED, EXIT_PREEMPTED


class StopRequest:
    """Whether, and with which exit code, somebody asked the run to end.

    Attributes:
        exit_code: None as long as nobody did.
        world: The processes that stop together.
    """

    def __init__(self) -> None:
        self.exit_code: int | None = None
        self.world = World()
        self._asked: int | None = None  # this process; a signal may come while the others answer
        self._listen: Callable[[], None] | None = None  # once the processes have met

    def join(self, world: World) -> None:
        """Stop together with the processes of `world`, whose signals ask from now on."""
        self.world = world
        if self._listen is not None:
            self._listen()

    def requested(self) -> bool:
        """Tell whether somebody asked any of the processes; each of them must look."""
        if self.exit_code is None:
            self.exit_code = self.world.all_reduce_max(self._asked or 0) or None
        return self.exit_code is not None

    def request(self, exit_code: int = EXIT_INTERRUPTED) -> None:
        """Ask, by default as Ctrl-C does."""
        self._asked = self._asked or exit_code

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """Let Ctrl-C, SIGTERM and SIGUSR1 ask once; a second signal interrupts at once.

        Not so where there are several processes: there one signal may come both from a scheduler
        and from torchrun. These listen once they have met (`join`): a process that still waits for
        the others has nothing to save, and a signal ends it even where it waits in a library.
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
    """Let Ctrl-C end nothing: all is saved, and only its words are still to be printed."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
