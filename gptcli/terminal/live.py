"""The display of a training run: redrawn in place on a terminal, plain lines elsewhere.

A thread draws, a few times a second; training only leaves its events. The cursor stays visible, on
every way out too.
"""

import threading
import time
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from gptcli.formatting import printable
from gptcli.terminal import console
from gptcli.terminal.frame import frame
from gptcli.terminal.run_state import RunState
from gptcli.training.events import Event, Finished, Sampled, Started, Stopped, describe

_SECONDS = 0.4  # between two pictures


class TrainScreen:
    """Shows the events of a training run."""

    def __init__(self, terminal: Console | None = None, live: bool | None = None) -> None:
        """Draw nothing yet.

        Args:
            terminal: Where to; stderr if none is given.
            live: Whether it can be redrawn; found out if none is given.
        """
        self._terminal = terminal or console.terminal()
        self._is_live = console.is_live() if live is None else live
        self._board = RunState(time.monotonic())
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._live: Live | None = None
        self._size = self._terminal.size
        self._thread = threading.Thread(target=self._draw_on, name="screen", daemon=True)
        self._last: Event | None = None

    def __enter__(self) -> "TrainScreen":
        if self._is_live:
            self._begin()
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is None:
            return
        self._ended.set()
        try:
            self._thread.join()
        finally:
            self._live.stop()
        if self._board.now is None:
            self._say(self._last)
            return
        if not isinstance(self._last, Stopped | Finished):
            self._board.work = "failed"
        sample, self._board.sample = self._board.sample, None
        self._terminal.print(self._picture())
        if sample is not None:
            self._terminal.print()
            self._say(sample)
        self._say(self._last)

    def show(self, event: Event) -> None:
        """Show one event."""
        if self._live is None:
            if (text := describe(event)) is not None:
                self._terminal.print(Text(printable(text)))
            return
        with self._lock:
            self._board.update(event, time.monotonic())
            if isinstance(event, Started):
                self._say(event)
                self._live.refresh()
            self._last = event

    def _begin(self) -> None:
        self._live = Live(
            console=self._terminal,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            get_renderable=self._picture,
            vertical_overflow="crop",
        )
        self._size = self._terminal.size
        self._live.start()

    def _draw_on(self) -> None:
        while not self._ended.wait(_SECONDS):
            try:
                with self._lock:
                    self._draw()
            except OSError:  # the terminal is gone; training is not
                return

    def _draw(self) -> None:
        assert self._live is not None
        if self._terminal.size != self._size:
            # Terminals wrap what is there anew, each in its own way: begin on a clean screen.
            self._live.stop()
            self._terminal.clear()
            self._say(self._board.started)
            self._begin()
        self._live.refresh()

    def _picture(self) -> Group:
        width, height = self._terminal.size
        plain = self._terminal.options.ascii_only
        return Group(*frame(self._board, width, height, time.monotonic(), plain=plain))

    def _say(self, event: Event | None) -> None:
        """Print what stays on the terminal."""
        text = describe(event) if event is not None else None
        if text is None:
            return
        for line in printable(text).splitlines():
            name, colon, rest = line.partition(": ")
            if isinstance(event, Sampled) or not colon or " " in name:
                self._terminal.print(Text(line), soft_wrap=False)
                continue
            style = "yellow" if name == "advice" else "dim"
            self._terminal.print(Text.assemble((f"{name}: ", style), rest), soft_wrap=False)
