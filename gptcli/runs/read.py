"""Read a run folder, also while training writes in it.

A file that is missing or damaged is reported as a problem, never an error.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from gptcli import atomic
from gptcli.config.yaml import read_yaml
from gptcli.errors import GptError
from gptcli.runs import record
from gptcli.runs.record import Epoch, Evaluation, RunHistory, Step

_CHECKPOINTS = (record.BEST, record.LAST, "checkpoints/step-*.pt")
# More than training writes: a longer file is damaged, and reading it could take forever.
_MAX_FILE, _MAX_OBJECT, _MAX_ROW = 1 << 30, 1 << 20, 1 << 24  # bytes

Row = TypeVar("Row")
Facts = TypeVar("Facts", bound=BaseModel)


def read_run(folder: Path) -> RunHistory:
    """Read a run folder; each file that cannot be read becomes one of the problems."""
    problems: list[str] = []
    rows = _rows(folder / record.METRICS, metrics_row, problems)
    samples = _rows(folder / record.SAMPLES, record.TextSample.model_validate, problems)
    return RunHistory(
        folder=folder,
        name=folder.resolve().name,
        settings=_settings(folder / record.CONFIG, problems),
        facts=_object(folder / record.RUN, record.RunFacts, problems),
        status=_object(folder / record.STATUS, record.Status, problems),
        steps=tuple(row for row in rows if isinstance(row, Step)),
        evaluations=tuple(row for row in rows if isinstance(row, Evaluation)),
        epochs=tuple(row for row in rows if isinstance(row, Epoch)),
        samples=tuple(samples),
        checkpoints=_checkpoints(folder),
        problems=tuple(problems),
    )


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested sections by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def read_rows(
    path: Path, content: bytes, parse: Callable[[Any], Row], problems: list[str]
) -> Iterator[tuple[bytes, Row]]:
    """Yield each line of a JSON lines file with its parsed row.

    The last line may be one that is just being written, or that a crash cut short: no problem.
    """
    damaged = []
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        try:
            if len(line) > _MAX_ROW:
                raise ValueError("too long")
            row = parse(json.loads(line))
        except (ValueError, TypeError, RecursionError):
            damaged.append(number)
            continue
        yield line + b"\n", row
    if damaged:
        n_lines = f"{len(damaged)} lines that cannot be read, the first is line {damaged[0]}"
        one_line = f"line {damaged[0]} that cannot be read"
        problems.append(f"{path}: skipped {one_line if len(damaged) == 1 else n_lines}")


def metrics_row(line: Any) -> Step | Evaluation | Epoch | record.Other:
    """Return the record that a line of metrics.jsonl holds."""
    if not isinstance(line, dict):
        raise TypeError(line)
    if "epoch" in line:
        return Epoch.model_validate(line)
    if "val_loss" in line:
        return Evaluation.model_validate(line)
    return (Step if "loss" in line else record.Other).model_validate(line)


def _read(path: Path, problems: list[str], most: int = _MAX_FILE) -> bytes | None:
    """Return a file's content; None, and a problem unless there is no file, where that fails."""
    try:
        if path.stat().st_size > most:
            problems.append(f"{path}: too large to read")
            return None
        return atomic.read_bytes(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error.strerror})")
        return None


def _rows(path: Path, parse: Callable[[Any], Row], problems: list[str]) -> list[Row]:
    content = _read(path, problems) or b""
    return [row for _, row in read_rows(path, content, parse, problems)]


def _object(path: Path, kind: type[Facts], problems: list[str]) -> Facts:
    """Return a JSON file's object; an empty one where the file is missing or damaged."""
    n_before = len(problems)
    content = _read(path, problems, _MAX_OBJECT)
    try:
        if content is not None:
            return kind.model_validate_json(content)
        problems += [f"{path}: is missing"] * (len(problems) == n_before)
    except ValidationError:
        problems.append(f"{path}: cannot be read")
    return kind()


def _settings(path: Path, problems: list[str]) -> dict[str, object]:
    """Return config.yaml flat; not validated, as another version may have written it."""
    try:
        return flatten(read_yaml(path).values)
    except GptError as error:
        problems.append(error.message.splitlines()[0])
        return {}


def _checkpoints(folder: Path) -> dict[str, int]:
    sizes = {}
    for path in (path for pattern in _CHECKPOINTS for path in sorted(folder.glob(pattern))):
        with contextlib.suppress(OSError):  # training has just removed it
            sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    return sizes
