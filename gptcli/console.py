"""What every command prints with: messages, errors, results and bars.

stdout carries results, stderr everything else. Off a terminal there are plain lines and no escape
codes; text from models, data and file names loses its control characters first.
"""

import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from gptcli.durable import storage_errors
from gptcli.errors import ConfigError
from gptcli.formatting import duration, size

# C0 without newline and tab, DEL, C1, and the marks that reorder text (CWE-150).
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")

_err = Console(stderr=True, highlight=False, soft_wrap=True)


def printable(text: str) -> str:
    """Return `text` without the characters that steer a terminal."""
    return _CONTROL.sub("", text).encode("utf-8", "replace").decode()


def message(text: str, style: str = "") -> None:
    """Print a message to stderr."""
    _err.print(Text(printable(text), style=style))


def error(text: str, hint: str | None = None) -> None:
    """Print an error and how to mend it to stderr."""
    _err.print(Text.assemble(("error: ", "bold red"), printable(text)))
    if hint:
        _err.print(Text.assemble(("hint: ", "bold"), printable(hint)))


def prompt(text: str) -> None:
    """Show the prompt that the result continues, on stderr."""
    _err.print(Text(printable(text), style="dim"), end="")


def ask(sign: str) -> str | None:
    """Return the next line of stdin without its end; None when there are no more.

    At a terminal there is a sign to type behind, and lines can be edited and called back.
    """
    if sys.stdin is None:
        return None
    try:
        if sys.stdin.isatty() and sys.stdout is not None and sys.stdout.isatty():
            with contextlib.suppress(ImportError):  # not on Windows, whose terminal edits by itself
                import readline  # noqa: F401
            return input(sign)
        line = sys.stdin.readline()
    except (EOFError, KeyboardInterrupt):
        write("\n")
        return None
    except UnicodeDecodeError as error:
        raise ConfigError("a line on stdin is not UTF-8") from error
    return line.removesuffix("\n").removesuffix("\r") if line else None


def result(text: str) -> None:
    """Print a line of the result to stdout."""
    write(printable(text) + "\n")


def styled(*parts: tuple[str, str]) -> None:
    """Print a line of the result to stdout: texts, each with its style where there is colour."""
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    with console.capture() as capture:
        console.print(Text.assemble(*((printable(text), style) for text, style in parts)))
    write(capture.get())


def write(text: str) -> None:
    """Write text to stdout as it is, at once.

    Raises:
        StorageError: stdout is a file on a full disk.
    """
    if sys.stdout is None:  # closed by whoever started us
        return
    with storage_errors(Path("stdout")):
        try:
            sys.stdout.write(text)
        except UnicodeEncodeError:  # a terminal or pipe that is not UTF-8
            encoding = sys.stdout.encoding or "ascii"
            sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
        sys.stdout.flush()


def result_json(value: dict[str, Any]) -> None:
    """Print the one JSON object of `--json` to stdout; what is not a finite number is null."""
    write(json.dumps(_finite(value)) + "\n")


def _finite(value: Any) -> Any:
    match value:
        case dict():
            return {key: _finite(inner) for key, inner in value.items()}
        case list():
            return [_finite(inner) for inner in value]
        case float() if value != value or value in (float("inf"), float("-inf")):
            return None
    return value


def terminal() -> Console:
    """Return what draws on stderr."""
    return _err


def is_live() -> bool:
    """Tell whether stderr is a terminal that can be redrawn; FORCE_COLOR makes a pipe none."""
    return sys.stderr is not None and sys.stderr.isatty() and _err.is_interactive


class Bar:
    """One bar of work; nothing where there is no terminal."""

    def __init__(self, progress: Progress | None, task: TaskID | None) -> None:
        self._progress, self._task = progress, task

    def advance(self, amount: int) -> None:
        """Add `amount` to what is done."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, amount)

    def update(self, done: int, total: int) -> None:
        """Set what is done, and what there is."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, total=total)


@contextmanager
def bar(text: str, total: int | None = None) -> Iterator[Bar]:
    """Show a bar while the block runs; without `total`, that something is going on."""
    if not is_live():
        yield Bar(None, None)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_err, transient=True) as progress:
        yield Bar(progress, progress.add_task(printable(text), total=total))


@contextmanager
def byte_bars(totals: dict[str, int | None]) -> Iterator[Callable[[str, int], None]]:
    """Show a bar of bytes, with rate and time left, for each kind of work.

    Yields what is to be called with a kind and the bytes newly done. Off a terminal there is a
    line now and then, so that a log of hours shows that they went by.

    Args:
        totals: The bytes there are of each kind; None where that is not known.
    """
    if not is_live():
        yield _ByteLog(totals).advance
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=_err, transient=True, expand=True) as progress:
        tasks = {kind: progress.add_task(kind, total=total) for kind, total in totals.items()}

        def advance(kind: str, n_bytes: int) -> None:
            if kind not in tasks:  # a download that nobody foresaw
                tasks[kind] = progress.add_task(kind, total=None)
            progress.advance(tasks[kind], n_bytes)

        yield advance


class _ByteLog:
    """Says in plain lines, twice a minute, how much is done."""

    _EVERY = 30.0

    def __init__(self, totals: dict[str, int | None]) -> None:
        self._totals = totals
        self._done = dict.fromkeys(totals, 0)
        self._began = self._last = time.monotonic()

    def advance(self, kind: str, n_bytes: int) -> None:
        self._done[kind] = self._done.get(kind, 0) + n_bytes
        now = time.monotonic()
        if now - self._last < self._EVERY:
            return
        self._last = now
        parts = []
        for each, done in self._done.items():
            total, rate = self._totals.get(each), done / (now - self._began)
            of = f" of {size(total)}" if total else ""
            left = f", {duration((total - done) / rate)} left" if total and rate else ""
            parts.append(f"{each} {size(done)}{of}, {size(rate)}/s{left * (done < (total or 0))}")
        message("; ".join(parts))


def table(
    header: tuple[str, ...], rows: Iterable[tuple[str, ...]], fold: tuple[int, ...] = (-1,)
) -> None:
    """Print a table to stdout; columns in `fold` are folded where the terminal is too narrow."""
    titles = (escape(printable(title)) for title in header)
    drawn = Table(*titles, box=None, show_header=any(header), pad_edge=False, padding=(0, 2, 0, 0))
    for column in drawn.columns:
        column.no_wrap = True
    for number in fold:
        drawn.columns[number].no_wrap = False
        drawn.columns[number].overflow = "fold"
    for row in rows:
        drawn.add_row(*(Text(printable(cell)) for cell in row))
    narrow = sys.stdout is not None and sys.stdout.isatty()
    console = Console(highlight=False, color_system=None, width=None if narrow else 200)
    with console.capture() as capture:
        console.print(drawn)
    write("".join(line.rstrip() + "\n" for line in capture.get().splitlines()))
