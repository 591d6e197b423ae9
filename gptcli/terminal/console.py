"""What every command prints with: messages, errors, results and bars.

stdout carries results, stderr everything else. Without a terminal there are plain lines and no
escape codes; text from models, data and file names loses its control characters first.
"""

import contextlib
import errno
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

from rich import progress
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from gptcli.errors import ConfigError, StorageError
from gptcli.formatting import duration, printable, size

_LOG_SECONDS = 30.0  # between lines of progress


class Terminal(Console):
    """A console that never hides the cursor, because a killed process could not show it again."""

    def show_cursor(self, show: bool = True) -> bool:
        return super().show_cursor(True)


stderr = Terminal(stderr=True, highlight=False, soft_wrap=True)


class OutputLostError(StorageError):
    """stdout cannot be written: exit code 5, or a silent 0 if the reader has closed the pipe."""

    def __init__(self, cause: OSError) -> None:
        hint = "run it again with stdout open, and going to a disk with free space"
        super().__init__(f"stdout: {cause.strerror}", hint)
        self.exit_code = 0 if cause.errno == errno.EPIPE else self.exit_code


class Output(io.TextIOWrapper):
    """stdout or stderr; a failed write is an error once for results, never for messages."""

    def __init__(self, file: BinaryIO, encoding: str, *, results: bool, at_once: bool) -> None:
        errors = "replace" if results else "backslashreplace"
        super().__init__(file, encoding, errors, newline="\n", line_buffering=at_once)
        self._results = results

    def write(self, text: str) -> int:
        with self._losing():
            super().write(text)
        return len(text)

    def flush(self) -> None:
        with self._losing():
            super().flush()

    @contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)  # for what is flushed at exit, too
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if self._results:
                raise OutputLostError(error) from error


def take_output() -> None:
    """Make stdout and stderr of this process `Output`, also where they are closed.

    A file opened later must not get the number of a closed one, and then hold what is printed.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDONLY)  # the lowest number; writing to it fails
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        file = stream.buffer if stream is not None else open(number, "wb", closefd=False)
        encoding = stream.encoding if stream is not None else "utf-8"
        at_once = stream is None or stream.line_buffering
        setattr(sys, name, Output(file, encoding, results=number == 1, at_once=at_once))


def message(text: str, style: str = "", end: str = "\n") -> None:
    """Print a message to stderr."""
    stderr.print(Text(printable(text), style=style), end=end)


def error(text: str, hint: str | None = None) -> None:
    """Print an error and how to fix it to stderr."""
    stderr.print(Text.assemble(("error: ", "bold red"), printable(text)))
    if hint:
        stderr.print(Text.assemble(("hint: ", "bold"), printable(hint)))


@contextmanager
def notes() -> Iterator[None]:
    """Show what the API logs while the block runs; warnings stand out."""
    import logging  # not for --help

    class Notes(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            is_warning = record.levelno >= logging.WARNING
            text = "warning: " * is_warning + record.getMessage()
            message(text, "bold red" if is_warning else "")

    logger, handler = logging.getLogger("gptcli"), Notes()
    level, logger.propagate = logger.level, False
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = True


def ask(sign: str, *, message: bool = False) -> str | None:
    """Return the next line of stdin without its end; None when there are no more.

    At a terminal it prompts with `sign`, and lines can be edited and recalled. Of a message, lines
    pasted together are one, and Ctrl-C discards what was typed instead of ending the input.
    """
    if sys.stdin is None:
        return None
    try:
        if sys.stdin.isatty() and sys.stdout.isatty():
            with contextlib.suppress(ImportError):  # not on Windows, whose terminal edits by itself
                import readline

                readline.parse_and_bind(f"set enable-bracketed-paste {'on' if message else 'off'}")
            return input(sign)
        line = sys.stdin.readline()
    except (EOFError, KeyboardInterrupt) as error:
        write("\n")
        return "" if message and isinstance(error, KeyboardInterrupt) else None
    except UnicodeDecodeError as error:
        raise ConfigError("a line on stdin is not UTF-8") from error
    return line.removesuffix("\n").removesuffix("\r") if line else None


def result(text: str) -> None:
    """Print a line of the result to stdout."""
    write(printable(text) + "\n")


def styled(*parts: tuple[str, str]) -> None:
    """Print a line of the result to stdout: texts, each with its style where there is color."""
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True)
    with console.capture() as capture:
        console.print(Text.assemble(*((printable(text), style) for text, style in parts)))
    write(capture.get())


def marked(parts: list[tuple[str, bool]]) -> None:
    """Print texts to stdout, those that count in color; without color as {+...+}."""
    console = Console(file=sys.stdout)
    if console.color_system is not None and not console.no_color:
        styled(*((text, "bold green" if counts else "") for text, counts in parts))
    else:
        result("".join(f"{{+{text}+}}" if counts else text for text, counts in parts))


def write(text: str) -> None:
    """Write text to stdout as it is, at once.

    Raises:
        OutputLostError: stdout is closed, or a file on a full disk.
    """
    sys.stdout.write(text)
    sys.stdout.flush()


def result_json(value: dict[str, Any]) -> None:
    """Print the one JSON object of `--json` to stdout; what is not a finite number is null."""
    write(json.dumps(_finite(value)) + "\n")


def _finite(value: Any) -> Any:
    match value:
        case dict():
            return {key: _finite(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_finite(inner) for inner in value]
        case float() if not math.isfinite(value):
            return None
    return value


def is_live() -> bool:
    """Tell whether stderr is a terminal that can be redrawn; FORCE_COLOR does not make it one."""
    return sys.stderr.isatty() and stderr.is_interactive


class Bar:
    """A bar of work; without a terminal it is not drawn."""

    def __init__(self, bars: progress.Progress, task: progress.TaskID) -> None:
        self._bars, self._task = bars, task

    def advance(self, amount: int) -> None:
        """Add `amount` to what is done."""
        self._bars.advance(self._task, amount)

    def update(self, done: int, total: int) -> None:
        """Set what is done, and what there is."""
        self._bars.update(self._task, completed=done, total=total)


@contextmanager
def bar(text: str, total: int | None = None) -> Iterator[Bar]:
    """Show a bar while the block runs; without `total`, that something is in progress."""
    columns = (progress.SpinnerColumn(), "{task.description}", progress.BarColumn(bar_width=None),
               progress.TaskProgressColumn(), progress.TimeRemainingColumn())  # fmt: skip
    bars = progress.Progress(*columns, console=stderr, transient=True)
    task = bars.add_task(printable(text), total=total)
    with bars if is_live() else contextlib.nullcontext():
        yield Bar(bars, task)


@contextmanager
def byte_bars() -> Iterator[Callable[[str, int, int | None], None]]:
    """Show a bar of bytes, with rate and time left, for each kind of work.

    Yields what is to be called with a kind, the bytes newly done, and the bytes in all if known.
    Off a terminal there is a line now and then, so that a log of hours shows progress.
    """
    columns = ("{task.description}", progress.BarColumn(bar_width=None), progress.DownloadColumn(),
               progress.TransferSpeedColumn(),
               progress.TimeRemainingColumn(compact=True))  # fmt: skip
    bars = progress.Progress(*columns, console=stderr, transient=True, expand=True)
    tasks: dict[str, progress.TaskID] = {}
    said = time.monotonic()

    def advance(kind: str, n_bytes: int, total: int | None) -> None:
        nonlocal said
        if kind not in tasks:
            tasks[kind] = bars.add_task(kind, total=total)
        bars.update(tasks[kind], advance=n_bytes, total=total)
        if not is_live() and time.monotonic() - said >= _LOG_SECONDS:
            said = time.monotonic()
            message("; ".join(map(_progress_of, bars.tasks)))

    with bars if is_live() else contextlib.nullcontext():
        yield advance


def _progress_of(task: progress.Task) -> str:
    """Return in a few words how much of a task is done."""
    rate, total = task.completed / (task.elapsed or math.inf), task.total
    of = f" of {size(total)}" if total else ""
    left = ""
    if total and 0 < task.completed < total:
        left = f", {duration((total - task.completed) / rate)} left"
    return f"{task.description} {size(task.completed)}{of}, {size(rate)}/s{left}"


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
    width = None if sys.stdout.isatty() else 200
    console = Console(highlight=False, color_system=None, width=width)
    with console.capture() as capture:
        console.print(drawn)
    write("".join(line.rstrip() + "\n" for line in capture.get().splitlines()))
