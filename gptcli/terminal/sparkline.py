"""A loss curve in a few lines of text: braille dots, eight to a character.

Every peak is kept: a column of dots reaches from the lowest to the highest loss that falls into it.
Knows no terminal and no run.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.text import Text

_MOST_CELLS = 1024
_START_PART = 0.1  # of a course, which may lie above the frame
_LABEL = 7  # columns of a value beside the curve
# Bit of each dot of a character, by column and by row from the top (Unicode's block U+2800).
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_BLANK = 0x2800


@dataclass
class _Cell:
    step: int
    low: float
    high: float


class LossHistory:
    """The losses of a run, in bounded memory: neighbours are merged, extremes are kept.

    Attributes:
        first: The first step; 0 while there is none.
    """

    def __init__(self) -> None:
        self.first = 0
        self._cells: list[_Cell] = []
        self._steps_per_cell = 1
        self._end = 0  # the first step after the last cell

    def add(self, step: int, loss: float) -> None:
        """Add the loss of a step, later than those before; what is not finite is left out."""
        if not math.isfinite(loss):
            return
        if self._cells and step < self._end:
            last = self._cells[-1]
            last.step, last.low, last.high = step, min(last.low, loss), max(last.high, loss)
            return
        self.first = self.first or step
        self._cells.append(_Cell(step, loss, loss))
        self._end = step + self._steps_per_cell
        if len(self._cells) > _MOST_CELLS:
            pairs = zip(self._cells[::2], self._cells[1::2], strict=False)
            odd = self._cells[-1:] if len(self._cells) % 2 else []
            self._cells = [_Cell(b.step, min(a.low, b.low), max(a.high, b.high)) for a, b in pairs]
            self._cells += odd
            self._steps_per_cell *= 2

    def __len__(self) -> int:
        """Return how many cells there are to draw."""
        return len(self._cells)

    def cells(self) -> Sequence[_Cell]:
        """Return the cells in the order of their steps."""
        return self._cells


def draw_curve(
    course: LossHistory,
    marks: Sequence[tuple[int, float]],
    best: tuple[int, float] | None,
    width: int,
    height: int,
) -> list[Text]:
    """Return a curve as lines, the last of which names the steps and the signs.

    Args:
        course: At least two cells.
        marks: Steps and validation losses, drawn as `o`.
        best: That of the lowest, drawn as `*`.
        width: Columns, at least 20.
        height: Lines, at least 3.
    """
    cells = course.cells()
    n_columns, n_rows = width - _LABEL - 2, height - 1
    first, last = course.first, max(cells[-1].step, *(step for step, _ in marks), 0)
    low, high = _frame(cells, marks)

    def column(step: int) -> int:
        return round((step - first) / max(1, last - first) * (2 * n_columns - 1))

    def row(value: float) -> int:
        place = round((high - value) / (high - low) * (4 * n_rows - 1))
        return min(max(place, 0), 4 * n_rows - 1)

    grid = [[0] * n_columns for _ in range(n_rows)]
    reach: dict[int, tuple[float, float]] = {}
    for cell in cells:
        below, above = reach.get(x := column(cell.step), (cell.low, cell.high))
        reach[x] = min(below, cell.low), max(above, cell.high)
    for x, top, bottom in _strokes([(x, row(up), row(down)) for x, (down, up) in reach.items()]):
        for y in range(top, bottom + 1):
            grid[y // 4][x // 2] |= _DOTS[x % 2][y % 4]
    lines = [Text("".join(chr(_BLANK + dots) for dots in line), style="cyan") for line in grid]
    signs = [(mark, "o", "yellow") for mark in marks if mark[0] >= first]
    signs += [(best, "*", "bold green")] if best is not None and best[0] >= first else []
    for (step, value), sign, style in signs:
        place, line = column(step) // 2, lines[row(value) // 4]
        lines[row(value) // 4] = Text.assemble(line[:place], (sign, style), line[place + 1 :])
    labels = {0: high, n_rows - 1: low} | ({n_rows // 2: (high + low) / 2} if n_rows > 6 else {})
    for number, line in enumerate(lines):
        label = _number(labels[number]) if number in labels else ""
        lines[number] = Text.assemble((f"{label:>{_LABEL}} │", "dim"), line)
    return [*lines, _steps_line(first, last, n_columns, bool(marks), best is not None)]


def _steps_line(first: int, last: int, n_columns: int, has_marks: bool, has_best: bool) -> Text:
    left, right = f"{first:,}", f"{last:,}"
    room = n_columns - len(left) - len(right)
    names = ["o validation"] * has_marks + ["* best"] * has_best
    legend = "  ".join(["step", *names])
    middle = legend.center(room) if len(legend) + 2 <= room else " " * max(1, room)
    return Text(f"{'':{_LABEL + 2}}{left}{middle}{right}", style="dim")


def _frame(cells: Sequence[_Cell], marks: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Return the lowest and the highest loss to show; the steep start may lie above."""
    settled = cells[int(len(cells) * _START_PART) :]
    shown = [value for _, value in marks[int(len(marks) * _START_PART) :]]
    low = min([*(cell.low for cell in settled), *shown])
    high = max([*(cell.high for cell in settled), *shown])
    return (low, high) if high - low > 1e-6 else (low - 0.5, high + 0.5)


def _strokes(points: Sequence[tuple[int, int, int]]) -> Iterator[tuple[int, int, int]]:
    """Yield column, top and bottom of upright strokes that join into a line.

    Args:
        points: Column, top and bottom of each column that has losses, from left to right.
    """
    before: tuple[int, int, int] | None = None
    for x, top, bottom in points:
        if before is not None:
            left, above, below = before
            start, end = (above + below) / 2, (top + bottom) / 2
            for between in range(left + 1, x):
                y = round(start + (end - start) * (between - left) / (x - left))
                # Strokes that do not touch are drawn out until they do.
                yield between, min(y, below), max(y, above)
                above = below = y
            yield x, min(top, below), max(bottom, above)
        yield x, top, bottom
        before = x, top, bottom


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.3g}"
