"""A loss curve in a few lines of text: braille dots, eight to a character.

Every peak is kept: a column of dots reaches from the lowest to the highest loss that falls into it.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from rich.text import Text

from gptcli.formatting import fixed
from gptcli.plotting.curves import settled

_LABEL = 7  # columns of a value beside the curve
# Bit of each dot of a character, by column and by row from the top (Unicode's block U+2800).
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_BLANK = 0x2800

Point = tuple[int, float]  # step and loss


def draw_curve(
    losses: Sequence[Point], marks: Sequence[Point], best: Point | None, width: int, height: int
) -> list[Text]:
    """Return a curve as lines, the last of which names the steps and the signs.

    It takes two training losses, 20 columns and 3 lines at least; `marks` of validation are drawn
    as `o`, the best as `*`.
    """
    n_columns, n_rows = width - _LABEL - 2, height - 1
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
        lines[i] = Text.assemble((f"{label:>{_LABEL}} │", "dim"), line)
    left, right = f"{first:,}", f"{last:,}"
    room = n_columns - len(left) - len(right)
    legend = "  ".join(["step", *["o validation"] * bool(marks), *["* best"] * (best is not None)])
    middle = legend.center(room) if len(legend) + 2 <= room else " " * max(1, room)
    return [*lines, Text(f"{'':{_LABEL + 2}}{left}{middle}{right}", style="dim")]


def _dots(points: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield the dots of straight lines between points: in each column, all that a line crosses."""
    for (x, y), (end, last) in pairwise(points):
        run = max(1, end - x)
        for done in range(end - x + 1):
            ends = sorted(round(y + (last - y) * at / run) for at in (done, min(done + 1, run)))
            for crossed in range(ends[0], ends[1] + 1):
                yield x + done, crossed
