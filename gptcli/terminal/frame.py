"""One picture of a run for a given width and height: lines that never are wider than that.

A pure function of the board and the clock; knows no terminal.
"""

from collections.abc import Sequence

from rich.cells import cell_len, chop_cells
from rich.text import Text

from gptcli.formatting import count, duration, loss, printable, scored, size
from gptcli.terminal.run_state import RunState
from gptcli.terminal.sparkline import draw_curve

_LABEL = 11
_FEWEST_CURVE, _MOST_CURVE = 4, 16
_MOST_SAMPLE = 12
_NARROW, _WIDE = 56, 128  # columns from which there are two and three numbers side by side

Number = tuple[str, str, str]  # label, value, style


def frame(
    board: RunState, width: int, height: int, at: float, *, plain: bool = False
) -> list[Text]:
    """Return the lines of the display.

    Args:
        board: What is known.
        width: Columns there are.
        height: Lines there are; one is left for the cursor.
        at: The time by the board's clock, seconds.
        plain: Draw with ASCII only, and no curve.
    """
    if board.started is None:
        return [_fit(Text(f"{board.work}: {_time(at - board.began)}", style="dim"), width)]
    room = max(1, height - 1)
    lines = [_progress(board, width, at, plain)]
    numbers = _grid(_numbers(board, at), width)
    if len(numbers) + 2 <= room:
        lines.append(Text())
    lines += numbers[: max(0, room - len(lines))]
    room -= len(lines)
    wanted = _sample_height(board, room)
    n_curve = min(_MOST_CURVE, room - wanted - 1)
    if len(board.course) >= 2 and n_curve >= _FEWEST_CURVE and width >= 24 and not plain:
        lines += [Text(), *draw_curve(board.course, board.marks, board.best, width, n_curve)]
        room -= n_curve + 1
    if wanted and room >= 3:
        lines += _sample(board, width, min(room, _MOST_SAMPLE))
    return [_fit(line, width) for line in lines]


def _sample_height(board: RunState, room: int) -> int:
    """Return the lines that the sample may take while the curve has enough too."""
    if board.sample is None or room < _FEWEST_CURVE + 4:
        return 0
    return min(_MOST_SAMPLE, max(3, room // 3))


def _progress(board: RunState, width: int, at: float, plain: bool) -> Text:
    assert board.started is not None
    done, goal = board.step, max(1, board.started.max_steps)
    left = board.seconds_left(at)
    texts = [f"{done:,}/{goal:,}", f"{done / goal:4.0%}"]
    texts += [f"{_time(left)} left"] if left is not None and not board.has_ended else []
    tail = "  ".join(texts)
    head = f"{board.work:<10} "
    room = width - len(head) - cell_len(tail) - 1
    styles = {"training": "bold", "finished": "bold green", "failed": "bold red"}
    style = styles.get(board.work, "bold yellow")
    if room < 8:
        return Text.assemble((head, style), tail)
    full = round(room * done / goal)
    on, off = ("=", "-") if plain else ("━", "─")
    return Text.assemble(
        (head, style), (on * full, "cyan"), (off * (room - full), "dim"), " ", tail
    )


def _numbers(board: RunState, at: float) -> list[Number]:
    """Return what there is to say, the most important first."""
    run, now = board.started, board.now
    assert run is not None
    numbers: list[Number] = []
    if now is not None:
        numbers.append(("loss", loss(now.loss), "bold"))
        if board.smoothed is not None:
            numbers.append(("smoothed", loss(board.smoothed), "bold"))
    numbers += _scores(board)
    if now is not None:
        mfu = board.mfu()
        share = f" MFU {mfu:.0%}" if mfu is not None else ""
        there = run.outlook.memory.available
        of = f" of {size(there)}" if there is not None else ""
        numbers += [
            ("lr", f"{now.lr:.2e}", ""),
            ("grad norm", f"{now.grad_norm:.3g}", ""),
            ("tokens/s", f"{count(now.tokens_per_second)}{share}", ""),
            ("memory", f"{size(now.memory_bytes)}{of}", ""),
        ]
    epochs = run.epochs * board.step / max(1, run.max_steps)
    numbers.append(("epochs", f"{epochs:,.2f} of {run.epochs:,.2f}", ""))
    numbers.append(("time", _time(board.seconds(at)), ""))
    if board.saved is not None:
        step, when = board.saved
        numbers.append(("saved", f"{_time(at - when)} ago, step {step:,}", ""))
    if board.skipped:
        numbers.append(("skipped", f"{board.skipped} steps, not finite", "bold red"))
    return numbers


def _scores(board: RunState) -> list[Number]:
    """Return the last validation loss and the best; of epochs where there is no validation."""
    assert board.started is not None
    validates = board.started.val_tokens > 0
    best, last = board.best, board.evaluated
    numbers: list[Number] = []
    if validates:
        value = last.val_loss if last is not None else None
        is_best = last is not None and best is not None and best[0] == last.step
        style = "bold green" if is_best else "" if value is not None else "dim"
        numbers.append(("val loss", "not yet" if value is None else loss(value), style))
        if part := scored(board.started.eval_tokens, board.started.val_tokens):
            numbers.append(("val part", part.strip(" ()"), ""))
    if best is not None:
        text = f"{loss(best[1])} at {best[0]:,}"
        numbers.append(("best val" if validates else "epoch loss", text, "green"))
    return numbers


def _grid(numbers: Sequence[Number], width: int) -> list[Text]:
    """Lay numbers out in columns, in reading order, as many as there is room for."""
    n_columns = 1 if width < _NARROW else 3 if width >= _WIDE else 2
    each = min(width // n_columns, 44)
    rows = []
    for first in range(0, len(numbers), n_columns):
        row = Text()
        for label, value, style in numbers[first : first + n_columns]:
            cell = Text.assemble((f"{label:<{_LABEL}}", "dim"), (printable(value), style))
            row.append_text(_fit(cell, each - 1, pad=each))
        rows.append(row)
    return rows


def _sample(board: RunState, width: int, room: int) -> list[Text]:
    assert board.sample is not None
    text = printable(board.sample.prompt + board.sample.text).expandtabs(4)
    wrapped = [part for line in text.splitlines() if line.strip()
               for part in chop_cells(line, max(2, width - 2))]  # fmt: skip
    kept = wrapped[: room - 2]
    if len(wrapped) > len(kept) and kept:
        kept[-1] = chop_cells(kept[-1], max(1, width - 6))[0] + " ..."
    head = Text(f"sample at step {board.sample.step:,}", style="dim")
    return [Text(), head, *(Text(f"  {line}") for line in kept)]


def _fit(line: Text, width: int, pad: int = 0) -> Text:
    """Return a line cut to a width, and filled up to another."""
    line = line.copy()
    line.no_wrap = True
    line.truncate(max(1, width), overflow="ellipsis" if pad and line.plain.isascii() else "crop")
    if (missing := pad - line.cell_len) > 0:
        line.append(" " * missing)
    return line


def _time(seconds: float) -> str:
    """Return a time without parts of a second, which would flicker."""
    return duration(round(seconds))
