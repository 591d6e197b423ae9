"""Read a run folder, also while training writes in it.

A file that is missing or damaged leaves a problem to be told, never an error.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from gptcli import durable
from gptcli.config.schema import Config
from gptcli.config.yaml12 import read_yaml
from gptcli.errors import GptError, StorageError
from gptcli.history.facts import (
    CheckpointFile,
    Epoch,
    Evaluation,
    RunFacts,
    RunHistory,
    Status,
    Step,
    TextSample,
)

RUN, STATUS, METRICS, SAMPLES, CONFIG, LOG = (
    "run.json", "status.json", "metrics.jsonl", "samples.jsonl", "config.yaml", "log.txt"
)  # fmt: skip
_CHECKPOINTS = ("best.pt", "last.pt", "checkpoints/step-*.pt")
_ENDED = re.compile(r"\S+ (?:finished|stopped) at step \d")
_TIME = re.compile(r"time: (\d+(?:\.\d+)?) s: (.+)")
_SHARE = re.compile(r"([a-z ]+) (\d+(?:\.\d+)?)%")

Row = TypeVar("Row")
Facts = TypeVar("Facts", bound=BaseModel)


def read_run(folder: Path) -> RunHistory:
    """Read all that a run folder tells.

    Raises:
        StorageError: A file may not be read.
    """
    problems: list[str] = []
    rows = [*_rows(folder / METRICS, _metrics_row, problems)]
    return RunHistory(
        folder=folder,
        name=folder.resolve().name,
        settings=_settings(folder / CONFIG, problems),
        facts=_object(folder / RUN, RunFacts, problems),
        status=_object(folder / STATUS, Status, problems),
        steps=tuple(row for row in rows if isinstance(row, Step)),
        evaluations=tuple(row for row in rows if isinstance(row, Evaluation)),
        epochs=tuple(row for row in rows if isinstance(row, Epoch)),
        samples=tuple(_rows(folder / SAMPLES, TextSample.model_validate, problems)),
        checkpoints=_checkpoints(folder),
        seconds_by_work=_seconds_by_work(folder / LOG),
        problems=tuple(problems),
    )


def changed_settings(settings: Mapping[str, object]) -> dict[str, object]:
    """Return the settings that are not the defaults, in the order of the schema."""
    defaults = flatten(Config().model_dump(mode="json"))
    unset = object()
    return {key: value for key, value in settings.items() if defaults.get(key, unset) != value}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """Return the values of nested sections by their dotted keys."""
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _read(path: Path) -> bytes | None:
    """Return a file's content, None where there is none."""
    try:
        with durable.storage_errors(path):
            return durable.read_bytes(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from error


def _rows(path: Path, parse: Callable[[Any], Row | None], problems: list[str]) -> Iterator[Row]:
    """Yield the lines of a JSON lines file; the last may be one that is just being written."""
    content = _read(path) or b""
    lines = content.split(b"\n")
    damaged = []
    for number, line in enumerate(lines[:-1], 1):
        try:
            row = parse(json.loads(line))
        except (ValueError, TypeError, RecursionError):
            damaged.append(number)
            continue
        if row is not None:
            yield row
    if damaged:
        what = f"line {damaged[0]}" if len(damaged) == 1 else f"{len(damaged)} lines"
        first = "" if len(damaged) == 1 else f", the first is line {damaged[0]}"
        problems.append(f"{path}: {what} cannot be read and left out{first}")


def _metrics_row(line: Any) -> Step | Evaluation | Epoch | None:
    """Return what a line of metrics.jsonl is; None for a kind that a later version may add."""
    if not isinstance(line, dict):
        raise TypeError(line)
    if "epoch" in line:
        return Epoch.model_validate(line)
    if "val_loss" in line:
        return Evaluation.model_validate(line)
    return Step.model_validate(line) if "loss" in line else None


def _object(path: Path, kind: type[Facts], problems: list[str]) -> Facts:
    """Return a JSON file's object; what it would say if it were empty, where it is unusable."""
    content = _read(path)
    if content is None:
        problems.append(f"{path}: is missing")
        return kind()
    try:
        return kind.model_validate_json(content)
    except ValidationError:
        problems.append(f"{path}: cannot be read")
        return kind()


def _settings(path: Path, problems: list[str]) -> dict[str, object]:
    """Return config.yaml flat; it is read, not judged, as it may be another version's."""
    try:
        return flatten(read_yaml(path).values)
    except GptError as error:
        problems.append(error.message.splitlines()[0])
        return {}


def _checkpoints(folder: Path) -> tuple[CheckpointFile, ...]:
    found = []
    for path in (path for pattern in _CHECKPOINTS for path in sorted(folder.glob(pattern))):
        try:
            size = path.stat().st_size
        except FileNotFoundError:  # training has just let go of it
            continue
        found.append(CheckpointFile(path.relative_to(folder).as_posix(), size))
    return tuple(found)


def _seconds_by_work(log: Path) -> dict[str, float]:
    """Add up the lines of log.txt that say where the time of a part of the run went."""
    spent: dict[str, float] = {}
    is_ended = False
    for line in (_read(log) or b"").decode("utf-8", "replace").split("\n"):
        if is_ended and (told := _TIME.match(line)):
            for work, share in _SHARE.findall(told[2]):
                work = work.strip()
                spent[work] = spent.get(work, 0.0) + float(told[1]) * float(share) / 100
        is_ended = _ENDED.match(line) is not None
    return spent
