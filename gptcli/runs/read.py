"""Read a run folder, also while training writes in it.

A file that is missing or damaged leaves a problem to be told, never an error.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from gptcli import atomic
from gptcli.config.yaml import read_yaml
from gptcli.errors import GptError
from gptcli.runs.files import BEST, CONFIG, LAST, LOG, METRICS, RUN, SAMPLES, STATUS
from gptcli.runs.record import (
    CheckpointFile,
    Epoch,
    Evaluation,
    Other,
    RunFacts,
    RunHistory,
    Status,
    Step,
    TextSample,
)

_CHECKPOINTS = (BEST, LAST, "checkpoints/step-*.pt")
_ENDED = re.compile(r"\S+ (?:finished|stopped) at step \d")
_TIME = re.compile(r"time: (\d+(?:\.\d+)?) s: (.+)")
_SHARE = re.compile(r"([a-z ]+) (\d+(?:\.\d+)?)%")
# Beyond what training writes: what is longer is damage, and reading it could take for ever.
_MOST_OF_A_FILE, _MOST_OF_AN_OBJECT, _MOST_OF_A_ROW = 1 << 30, 1 << 20, 1 << 24  # bytes
_MOST_OF_A_CONFIG, _MOST_OF_A_LINE = 1 << 16, 999

Row = TypeVar("Row")
Facts = TypeVar("Facts", bound=BaseModel)


def read_run(folder: Path) -> RunHistory:
    """Read all that a run folder tells; what cannot be read is a problem to be told."""
    problems: list[str] = []
    rows = _rows(folder / METRICS, metrics_row, problems)
    samples = _rows(folder / SAMPLES, TextSample.model_validate, problems)
    status = _object(folder / STATUS, Status, problems)
    return RunHistory(
        folder=folder,
        name=folder.resolve().name,
        settings=_settings(folder / CONFIG, problems),
        facts=_object(folder / RUN, RunFacts, problems),
        status=status,
        steps=tuple(row for row in rows if isinstance(row, Step)),
        evaluations=tuple(row for row in rows if isinstance(row, Evaluation)),
        epochs=tuple(row for row in rows if isinstance(row, Epoch)),
        samples=tuple(samples),
        checkpoints=_checkpoints(folder),
        seconds_by_work=status.seconds_by_work or _seconds_by_work(folder / LOG, problems),
        problems=tuple(problems),
    )


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """Return the values of nested sections by their dotted keys."""
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _read(path: Path, problems: list[str], most: int = _MOST_OF_A_FILE) -> bytes | None:
    """Return a file's content; None, and a problem unless there is no file, where that fails."""
    try:
        if path.stat().st_size > most:
            problems.append(f"{path}: is too long to be read")
            return None
        return atomic.read_bytes(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        problems.append(f"{path}: cannot be read ({error.strerror})")
        return None


def read_rows(
    path: Path, content: bytes, parse: Callable[[Any], Row], problems: list[str]
) -> Iterator[tuple[bytes, Row]]:
    """Yield the lines of a JSON lines file's content, each with what it says.

    The last line may be one that is just being written, or that a crash cut short: no problem.
    """
    lines = content.split(b"\n")
    damaged = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            if len(line) > _MOST_OF_A_ROW:
                raise ValueError("too long")
            row = parse(json.loads(line))
        except (ValueError, TypeError, RecursionError):
            damaged.append(number)
            continue
        yield line + b"\n", row
    if damaged:
        what = f"line {damaged[0]}" if len(damaged) == 1 else f"{len(damaged)} lines"
        first = "" if len(damaged) == 1 else f", the first is line {damaged[0]}"
        problems.append(f"{path}: skipped {what} that cannot be read{first}")


def _rows(path: Path, parse: Callable[[Any], Row], problems: list[str]) -> list[Row]:
    content = _read(path, problems) or b""
    return [row for _, row in read_rows(path, content, parse, problems)]


def metrics_row(line: Any) -> Step | Evaluation | Epoch | Other:
    """Return what a line of metrics.jsonl is."""
    if not isinstance(line, dict):
        raise TypeError(line)
    if "epoch" in line:
        return Epoch.model_validate(line)
    if "val_loss" in line:
        return Evaluation.model_validate(line)
    return (Step if "loss" in line else Other).model_validate(line)


def _object(path: Path, kind: type[Facts], problems: list[str]) -> Facts:
    """Return a JSON file's object; what it would say if it were empty, where it is unusable."""
    before = len(problems)
    content = _read(path, problems, _MOST_OF_AN_OBJECT)
    if content is None:
        problems += [f"{path}: is missing"] * (len(problems) == before)
        return kind()
    try:
        return kind.model_validate_json(content)
    except ValidationError:
        problems.append(f"{path}: cannot be read")
        return kind()


def _settings(path: Path, problems: list[str]) -> dict[str, object]:
    """Return config.yaml flat; it is read, not judged, as it may be another version's."""
    try:
        if _read(path, problems, _MOST_OF_A_CONFIG) is not None or not path.exists():
            return flatten(read_yaml(path).values)
    except GptError as error:
        problems.append(error.message.splitlines()[0])
    except (ValueError, RecursionError):
        problems.append(f"{path}: cannot be read")
    return {}


def _checkpoints(folder: Path) -> tuple[CheckpointFile, ...]:
    found = []
    for path in (path for pattern in _CHECKPOINTS for path in sorted(folder.glob(pattern))):
        try:
            size = path.stat().st_size
        except OSError:  # training has just let go of it
            continue
        found.append(CheckpointFile(path.relative_to(folder).as_posix(), size))
    return tuple(found)


def _seconds_by_work(log: Path, problems: list[str]) -> dict[str, float]:
    """Add up the lines of log.txt that say where the time went, for runs older than its record."""
    spent: dict[str, float] = {}
    is_ended = False
    for line in (_read(log, problems) or b"").decode("utf-8", "replace").split("\n"):
        if len(line) > _MOST_OF_A_LINE:
            continue
        if is_ended and (told := _TIME.match(line)):
            for part in told[2].split(", "):
                if share := _SHARE.fullmatch(part):
                    seconds = float(told[1]) * float(share[2]) / 100
                    spent[share[1]] = spent.get(share[1], 0.0) + seconds
        is_ended = _ENDED.match(line) is not None
    return spent
