"""The display of a training run: redrawn in place on a terminal, plain lines elsewhere.

A thread draws, a few times a second; training only passes its events. The cursor stays visible, on
every way out too.
"""

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise

from rich.cells import cell_len, chop_cells
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from gptcli.formatting import count, duration, fixed, loss, printable, scored, size
from gptcli.plotting.curves import settled
from gptcli.terminal import console
from gptcli.terminal.run_state import RunState
from gptcli.training.events import Event, Finished, Sampled, Started, Stopped, describe

_SECONDS = 0.4  # between two pictures
_LABEL = 11  # columns
_MIN_CURVE, _MAX_CURVE, _MAX_SAMPLE = 4, 16, 12  # lines
_NARROW, _WIDE = 56, 128  # columns from which there are two and three numbers side by side
_VALUE = 7  # columns of a value beside the curve
# Bit of each dot of a braille character (Unicode's block U+2800), by column and by row from above.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_BLANK = 0x2800

Number = tuple[str, str, str]  # label, value, style
Point = tuple[int, float]  # step and loss


class TrainScreen:
    """Shows the events of a training run."""

    def __init__(self, terminal: Console | None = None, live: bool | None = None) -> None:
        """Draw nothing yet, on stderr or another terminal; `live` says that it can be redrawn."""
        self._terminal = terminal or console.stderr
        self._is_live = console.is_live() if live is None else live
        self._state = RunState(time.monotonic())
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._live: Live | None = None
        self._thread = threading.Thread(target=self._draw_on, name="screen", daemon=True)
        self._last: Event | None = None

    def __enter__(self) -> "TrainScreen":
        if self._is_live:
            self._begin()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is None:
            return
        self._ended.set()
        try:
            self._thread.join()
        finally:
            self._live.stop()
        if self._state.now is not None:
            if not isinstance(self._last, Stopped | Finished):
                self._state.work = "failed"
            sample, self._state.sample = self._state.sample, None
            self._terminal.print(self._picture())
            if sample is not None:
                self._terminal.print()
                self._print(sample)
        self._print(self._last)

    def show(self, event: Event) -> None:
        """Show one event."""
        if self._live is None:
            if (text := describe(event)) is not None:
                # Rich takes ten times as long, which in a small network's step is to be seen.
                self._terminal.file.write(f"{printable(text)}\n")
                self._terminal.file.flush()
            return
        with self._lock:
            self._state.update(event, time.monotonic())
            if isinstance(event, Started):
                self._print(event)
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
            # On an OSError the terminal is gone, but training is not.
            with contextlib.suppress(OSError), self._lock:
                assert self._live is not None
                if self._terminal.size != self._size:
                    # Each terminal rewraps what is there in its own way: start with a clear screen.
                    self._live.stop()
                    self._terminal.clear()
                    self._print(self._state.started)
                    self._begin()
                self._live.refresh()

    def _picture(self) -> Group:
        width, height = self._terminal.size
        plain = self._terminal.options.ascii_only
        return Group(*frame(self._state, width, height, time.monotonic(), plain=plain))

    def _print(self, event: Event | None) -> None:
        """Print what stays on the terminal."""
        text = describe(event) if event is not None else None
        for line in printable(text or "").splitlines():
            name, colon, rest = line.partition(": ")
            if isinstance(event, Sampled) or not colon or " " in name:
                self._terminal.print(Text(line), soft_wrap=False)
                continue
            style = "yellow" if name == "advice" else "dim"
            self._terminal.print(Text.assemble((f"{name}: ", style), rest), soft_wrap=False)


def frame(
    state: RunState, width: int, height: int, at: float, *, plain: bool = False
) -> list[Text]:
    """Return the lines of the display, never wider or more than the terminal has.

    One line is left for the cursor; `at` is the time by the state's clock, and `plain` draws with
    ASCII only, and no curve.
    """
    if state.started is None:
        lines = [Text(f"{state.work}: {_time(at - state.began)}", style="dim")]
    else:
        lines = [_progress(state, width, at, plain), Text(), *_grid(_numbers(state, at), width)]
        room = max(1, height - 1)
        if len(lines) > room:
            del lines[1]
        lines = lines[:room]
        room -= len(lines)
        has_sample = state.sample is not None and room >= _MIN_CURVE + 4
        n_sample = min(_MAX_SAMPLE, max(3, room // 3)) if has_sample else 0
        n_curve = min(_MAX_CURVE, room - n_sample - 1)
        if len(state.losses) >= 2 and n_curve >= _MIN_CURVE and width >= 24 and not plain:
            lines += [Text(), *draw_curve(state.losses, state.marks, state.best, width, n_curve)]
            room -= n_curve + 1
        if has_sample:
            lines += _sample(state, width, min(room, _MAX_SAMPLE))
    for line in lines:
        line.no_wrap = True
        line.truncate(max(1, width), overflow="crop")
    return lines


def _progress(state: RunState, width: int, at: float, plain: bool) -> Text:
    assert state.started is not None
    done, goal = state.step, max(1, state.started.spec.max_steps)
    left = state.seconds_left(at)
    tail = f"{done:,}/{goal:,}  {done / goal:4.0%}"
    if left is not None and not state.has_ended:
        tail += f"  {_time(left)} left"
    head = f"{state.work:<10} "
    room = width - len(head) - cell_len(tail) - 1
    styles = {"training": "bold", "finished": "bold green", "failed": "bold red"}
    style = styles.get(state.work, "bold yellow")
    if room < 8:
        return Text.assemble((head, style), tail)
    full = round(room * done / goal)
    on, off = ("=", "-") if plain else ("━", "─")
    return Text.assemble(
        (head, style), (on * full, "cyan"), (off * (room - full), "dim"), " ", tail
    )


def _numbers(state: RunState, at: float) -> list[Number]:
    """Return what there is to show, the most important first."""
    assert state.started is not None
    plan, spec, now, best = state.started.plan, state.started.spec, state.now, state.best
    numbers: list[Number] = []
    if now is not None:
        numbers.append(("loss", loss(now.loss), "bold"))
    if state.smoothed is not None:
        numbers.append(("smoothed", loss(state.smoothed), "bold"))
    if spec.val_tokens:
        last = state.evaluated
        value = last.val_loss if last is not None else None
        is_best = last is not None and best is not None and best[0] == last.step
        style = "bold green" if is_best else "" if value is not None else "dim"
        numbers.append(("val loss", "not yet" if value is None else loss(value), style))
        if part := scored(spec.eval_tokens[1], spec.val_tokens):
            numbers.append(("val part", part.strip(" ()"), ""))
        for name, each in (last.sources if last is not None else {}).items():
            numbers.append((name[: _LABEL - 1], loss(each.loss), ""))
    if best is not None:  # of epochs where there is no validation
        label = "best val" if spec.val_tokens else "epoch loss"
        numbers.append((label, f"{loss(best[1])} at {best[0]:,}", "green"))
    if now is not None:
        mfu, available = state.mfu(), plan.memory.available
        share = f" MFU {mfu:.0%}" if mfu is not None else ""
        of = f" of {size(available)}" if available is not None else ""
        numbers += [
            ("lr", f"{now.lr:.2e}", ""),
            ("grad norm", f"{now.grad_norm:.3g}", ""),
            ("tokens/s", f"{count(now.tokens_per_second)}{share}", ""),
            ("memory", f"{size(now.memory_bytes)}{of}", ""),
        ]
    epochs = f"{fixed(spec.epochs_at(state.step), 2)} of {fixed(spec.epochs, 2)}"
    numbers += [("epochs", epochs, ""), ("time", _time(state.seconds(at)), "")]
    if state.saved is not None:
        step, when = state.saved
        numbers.append(("saved", f"{_time(at - when)} ago, step {step:,}", ""))
    if state.skipped:
        numbers.append(("skipped", f"{state.skipped} steps, not finite", "bold red"))
    return numbers


def _grid(numbers: list[Number], width: int) -> list[Text]:
    """Lay numbers out in columns, in reading order, as many as there is room for."""
    n_columns = 1 if width < _NARROW else 3 if width >= _WIDE else 2
    cell_width = max(2, min(width // n_columns, 44))
    rows = []
    for first in range(0, len(numbers), n_columns):
        row = Text()
        for label, value, style in numbers[first : first + n_columns]:
            cell = Text.assemble((f"{label:<{_LABEL}}", "dim"), (printable(value), style))
            cell.truncate(cell_width - 1, overflow="ellipsis", pad=True)
            row.append_text(cell).append(" ")
        rows.append(row)
    return rows


def _sample(state: RunState, width: int, room: int) -> list[Text]:
    assert state.sample is not None
    text = printable(state.sample.prompt + state.sample.text).expandtabs(4)
    wrapped = [part for line in text.splitlines() if line.strip()
               for part in chop_cells(line, max(2, width - 2))]  # fmt: skip
    kept = wrapped[: room - 2]
    if len(wrapped) > len(kept) and kept:
        kept[-1] = chop_cells(kept[-1], max(1, width - 6))[0] + " ..."
    head = Text(f"sample at step {state.sample.step:,}", style="dim")
    return [Text(), head, *(Text(f"  {line}") for line in kept)]


def _time(seconds: float) -> str:
    return duration(round(seconds))  # parts of a second would flicker


def draw_curve(
    losses: Sequence[Point], marks: Sequence[Point], best: Point | None, width: int, height: int
) -> list[Text]:
    """Return a curve in braille dots, eight to a character; the last line names steps and signs.

    Every peak is kept: a column of dots reaches from the lowest to the highest loss that falls into
    it. It takes two training losses, 20 columns and 3 lines at least; `marks` of validation are
    drawn as `o`, the best as `*`.
    """
    n_columns, n_rows = width - _VALUE - 2, height - 1
    first, last = losses[0][0], max(losses[-1][0], *(step for step, _ in marks), 0)
    shown = [value for points in (losses, marks) for _, value in settled(points)]
    low, high = min(shown), max(shown)  # the steep start may lie above
    low, high = (low, high) if high - low > 1e-6 else (low - 0.5, high + 0.5)

    def column(step: int) -> int:
        return round((step - first) / max(1, last - first) * (2 * n_columns - 1))

    def row(value: float) -> int:
        i = round((high - value) / (high - low) * (4 * n_rows - 1))
        return min(max(i, 0), 4 * n_rows - 1)

    grid = [[0] * n_columns for _ in range(n_rows)]
    for x, y in _dots([(column(step), row(value)) for step, value in losses]):
        grid[y // 4][x // 2] |= _DOTS[x % 2][y % 4]
    lines = [Text("".join(chr(_BLANK + dots) for dots in line), style="cyan") for line in grid]
    signs = [(mark, "o", "yellow") for mark in marks if mark[0] >= first]
    signs += [(best, "*", "bold green")] if best is not None and best[0] >= first else []
    for (step, value), sign, style in signs:
        i, line = column(step) // 2, lines[row(value) // 4]
        lines[row(value) // 4] = Text.assemble(line[:i], (sign, style), line[i + 1 :])
    labels = {0: high, n_rows - 1: low} | ({n_rows // 2: (high + low) / 2} if n_rows > 6 else {})
    for i, line in enumerate(lines):
        label = fixed(labels[i], 3) if i in labels else ""
        lines[i] = Text.assemble((f"{label:>{_VALUE}} │", "dim"), line)
    left, right = f"{first:,}", f"{last:,}"
    room = n_columns - len(left) - len(right)
    legend = "  ".join(["step", *["o validation"] * bool(marks), *["* best"] * (best is not None)])
    middle = legend.center(room) if len(legend) + 2 <= room else " " * max(1, room)
    return [*lines, Text(f"{'':{_VALUE + 2}}{left}{middle}{right}", style="dim")]


def _dots(points: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the dots of straight lines between points: in each column, all that a line crosses."""
    for (x, y), (end, last) in pairwise(points):
        run = max(1, end - x)
        for done in range(end - x + 1):
            ends = sorted(round(y + (last - y) * at / run) for at in (done, min(done + 1, run)))
            for crossed in range(ends[0], ends[1] + 1):
                yield x + done, crossed
