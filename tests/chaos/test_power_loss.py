"""Power cuts: every state a disk may legally be in afterwards holds all that was acknowledged.

The file operations of a run are recorded. A disk may lose what was not flushed: the content of a
file since its last fsync, and the names of a folder since that folder's. From each moment of the
recording all such states are made, and the program is asked to go on from them.
"""

import contextlib
import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gptcli import atomic
from gptcli.checkpoint import load_checkpoint
from gptcli.config import load_config
from gptcli.data.inspection import damaged_shards
from gptcli.data.prepare import make_plan, prepare
from gptcli.data.shards import read_manifest
from gptcli.errors import GptError
from gptcli.training.events import Evaluated, Saved
from gptcli.training.loop import train
from support.folders import copy_folder
from support.runs import THOROUGH, Figures, settings

SITES = ("atomic_write", "sync_folder of atomic_write", "sync_folder of link",
         "sync_folder of make_folder", "sync_file", "sync_folder of sync_file")  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """Something done to the disk: kind, path, and what belongs to it.

    Attributes:
        site: The function of `durable` that did it.
        content: Of the file, for "data" (written), "fsync" and "name" (a new name of a file).
        source: The name it had, for "name" by renaming; None for one more name.
    """

    kind: str
    path: str
    site: str = ""
    content: bytes = b""
    source: str | None = None


@dataclass
class Recording:
    """The operations below a folder, in order, and "ack" among them: what was said to be safe."""

    root: Path
    operations: list[Operation] = field(default_factory=list)

    def add(self, kind: str, path: Any, **more: Any) -> None:
        names = []
        frame = sys._getframe(2)
        while frame is not None and len(names) < 6:
            if frame.f_code.co_filename == atomic.__file__:
                names.append(frame.f_code.co_name)
            frame = frame.f_back  # type: ignore[assignment]
        site = " of ".join(names[:2]) if names[:1] == ["sync_folder"] else "".join(names[:1])
        self.operations.append(Operation(kind, os.path.abspath(path), site, **more))

    def without(self, site: str) -> "Recording":
        """Return what would have been recorded had one fsync been forgotten."""
        kept = [one for one in self.operations
                if not (one.kind in ("fsync", "fsync folder") and one.site == site)]  # fmt: skip
        assert len(kept) < len(self.operations), f"nothing is flushed by {site}"
        return Recording(self.root, kept)


@contextlib.contextmanager
def recording_in(root: Path) -> Iterator[Recording]:
    """Work in a folder, and record what this process does to files."""
    found = Recording(root)
    real = {name: getattr(os, name) for name in ("fsync", "replace", "link", "unlink", "mkdir")}

    def fsync(descriptor: int) -> None:
        real["fsync"](descriptor)
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if os.path.isdir(path):
            found.add("fsync folder", path)
        else:
            found.add("fsync", path, content=Path(path).read_bytes())

    def replace(source: Any, path: Any) -> None:
        content = Path(source).read_bytes()
        found.add("name", path, content=content, source=os.path.abspath(source))
        real["replace"](source, path)

    def link(source: Any, path: Any) -> None:
        found.add("name", path, content=Path(source).read_bytes(), source=None)
        real["link"](source, path)

    def unlink(path: Any, **how: Any) -> None:
        if os.path.lexists(path):
            found.add("unlink", path)
        real["unlink"](path, **how)

    def mkdir(path: Any, *how: Any) -> None:
        real["mkdir"](path, *how)
        found.add("folder", path)

    with contextlib.chdir(root), pytest.MonkeyPatch.context() as patch:
        for function in (fsync, replace, link, unlink, mkdir):
            patch.setattr(os, function.__name__, function)
        yield found


@dataclass
class Disk:
    """What is certainly on the disk, and what may be."""

    flushed: set[bytes] = field(default_factory=set)  # contents that were flushed, as they were
    names: dict[str, bytes | None] = field(default_factory=dict)  # certain; None is a folder
    pending: dict[str, list[Operation]] = field(default_factory=dict)  # by folder, in order

    def apply(self, one: Operation) -> None:
        folder = os.path.dirname(one.path)
        match one.kind:
            case "fsync":
                self.flushed.add(one.content)
                if one.path not in self.names and not os.path.basename(one.path).startswith(".tmp"):
                    # A file that is appended to: the recording sees it here for the first time.
                    self.pending.setdefault(folder, []).append(one)
                elif one.path in self.names:
                    self.names[one.path] = one.content
            case "fsync folder":
                for waiting in self.pending.pop(one.path, []):
                    _rename(self.names, waiting)
            case "name" | "unlink" | "folder":
                self.pending.setdefault(folder, []).append(one)

    def states(self) -> Iterator[dict[str, bytes | None]]:
        """Yield every set of names and contents that may be found after a cut."""
        waiting = [one for many in self.pending.values() for one in many]
        # Any of them may have come through without the others; a folder's last few are enough.
        recent, older = waiting[-7:], waiting[:-7]
        for chosen in itertools.product((False, True), repeat=len(recent)):
            names = dict(self.names)
            for one in older:
                _rename(names, one)
            for one, came in zip(recent, chosen, strict=True):
                if came:
                    _rename(names, one)
            for lost in (b"", None):
                yield {
                    path: self._content(content, lost)
                    for path, content in names.items()
                    if _has_folders(path, names, self.root)
                }
                if all(content is None or content in self.flushed for content in names.values()):
                    break

    root: str = ""

    def _content(self, content: bytes | None, lost: bytes | None) -> bytes | None:
        """Return what of a content that was never flushed is there: nothing, or half of it."""
        if content is None or content in self.flushed:
            return content
        return content[: len(content) // 2] if lost is None else lost


def _rename(names: dict[str, bytes | None], one: Operation) -> None:
    if one.kind == "unlink":
        names.pop(one.path, None)
    elif one.kind == "folder":
        names[one.path] = None
    else:
        names[one.path] = one.content


def _has_folders(path: str, names: dict[str, bytes | None], root: str) -> bool:
    parent = os.path.dirname(path)
    return parent == root or (parent in names and _has_folders(parent, names, root))


def states_of(
    recording: Recording, root: Path
) -> Iterator[tuple[dict[str, bytes | None], list[str]]]:
    """Yield the states after a cut at each moment, with what had been acknowledged by then."""
    disk, acknowledged = Disk(root=str(root)), []
    for one in recording.operations:
        if one.kind == "ack":
            acknowledged = [*acknowledged, os.path.basename(one.path)]
        else:
            disk.apply(one)
        for state in disk.states():
            yield state, acknowledged


_loaded: dict[bytes, int | None] = {}


def step_of(content: bytes, scratch: Path) -> int | None:
    """Return the step of a checkpoint, None if it does not load."""
    if content not in _loaded:
        scratch.write_bytes(content)
        try:
            _loaded[content] = load_checkpoint(scratch).state["step"]
        except GptError:
            _loaded[content] = None
        scratch.unlink()
    return _loaded[content]


def violations_of_a_run(recording: Recording, scratch: Path) -> set[str]:
    """Return what is wrong with the states that a recorded training may leave behind."""
    found, seen, count = set(), set(), 0
    folder = str(recording.root / "runs/tiny")
    for state, acknowledged in states_of(recording, recording.root):
        key = (frozenset((path, content) for path, content in state.items()
                         if path.startswith(folder)), tuple(acknowledged[-2:]))  # fmt: skip
        if key in seen:
            continue
        seen.add(key)
        count += 1
        named = {
            os.path.basename(path): content
            for path, content in state.items()
            if path.startswith(folder) and path.endswith(".pt") and content is not None
        }
        named = {name: content for name, content in named.items() if name[0] != "."}
        steps = {name: step_of(content, scratch) for name, content in named.items()}
        if corrupt := [name for name, step in steps.items() if step is None]:
            found.add(f"{corrupt[0]} is corrupt")
        there = [
            step for name, step in steps.items() if name.startswith("step") and step is not None
        ]
        saved = [int(name.split()[1]) for name in acknowledged if name.startswith("saved")]
        if saved and max(there, default=-1) < saved[-1]:
            found.add(f"step {saved[-1]} was acknowledged and is lost")
        best = [int(name.split()[1]) for name in acknowledged if name.startswith("best")]
        if (
            best
            and steps.get("best.pt", -1) not in (None, best[-1])
            and _is_last(acknowledged, "best")
        ):
            found.add(f"the best of step {best[-1]} was acknowledged and is lost")
        metrics = state.get(f"{folder}/metrics.jsonl")
        if there and max(there) > 0 and (metrics or b"").count(b'"loss"') < max(there):
            found.add(f"step {max(there)} has no history")
    violations_of_a_run.states = count  # type: ignore[attr-defined]
    return found


def _is_last(acknowledged: list[str], kind: str) -> bool:
    """Tell whether nothing has been written since: a newer best may be about to be linked."""
    return acknowledged[-1].startswith(kind)


@pytest.fixture(scope="module")
def recorded_run(prepared_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    small = ("train.max_steps=8", "train.log_every=1", "model.n_layer=1", "model.n_embd=8",
             "model.n_head=1")  # fmt: skip
    root = tmp_path_factory.mktemp("recorded")
    copy_folder(prepared_corpus / "data", root / "data")
    with recording_in(root) as recording:
        for event in train(load_config(None, settings(*THOROUGH, *small))):
            if isinstance(event, Saved):
                recording.add("ack", f"saved {event.step}")
            if isinstance(event, Evaluated) and event.is_best:
                recording.add("ack", f"best {event.step}")
    return recording


def test_a_run_survives_a_cut_at_any_moment(
    recorded_run: Recording, tmp_path: Path, figures: Figures
) -> None:
    assert violations_of_a_run(recorded_run, tmp_path / "scratch.pt") == set()
    count = violations_of_a_run.states  # type: ignore[attr-defined]
    assert count > 60
    figures(f"power loss while training: {len(recorded_run.operations)} operations, {count} states,"
            " 0 corrupt, 0 acknowledged saves lost")  # fmt: skip


@pytest.mark.parametrize("site", SITES)
def test_each_fsync_of_a_run_is_needed(recorded_run: Recording, tmp_path: Path, site: str) -> None:
    poorer = recorded_run.without(site)
    assert violations_of_a_run(poorer, tmp_path / "scratch.pt")


def violations_of_data(recording: Recording, scratch: Path) -> set[str]:
    """Return what is wrong with the states that a recorded preparation may leave behind."""
    found, seen, count = set(), set(), 0
    folder = str(recording.root / "data/rows")
    for state, acknowledged in states_of(recording, recording.root):
        files = {path: content for path, content in state.items() if path.startswith(folder)}
        key = (frozenset(files.items()), bool(acknowledged))
        if key in seen:
            continue
        seen.add(key)
        count += 1
        place = scratch / str(count)
        for path, content in sorted(files.items()):
            inside = place / os.path.relpath(path, folder)
            if content is None:
                inside.mkdir(parents=True, exist_ok=True)
            else:
                inside.parent.mkdir(parents=True, exist_ok=True)
                inside.write_bytes(content)
        if (place / "manifest.json").exists():
            try:
                damaged = list(damaged_shards(place, read_manifest(place), lambda n_bytes: None))
            except GptError as error:
                damaged = [error.message]
            if damaged:
                found.add(f"a finished folder is not whole: {damaged[0]}")
        elif acknowledged:
            found.add("the folder was said to be finished, and has no manifest")
    violations_of_data.states = count  # type: ignore[attr-defined]
    return found


@pytest.fixture(scope="module")
def recorded_preparation(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    root = tmp_path_factory.mktemp("recorded")
    rows = root / "rows"
    rows.mkdir()
    for index in range(3):
        (rows / f"{index}.jsonl").write_text(f'{{"text": "row of file {index} and more"}}\n' * 9)
    sets = [f"data.source={rows}", "data.dir=data/rows", "tokenizer.name=bytes"]
    with recording_in(root) as recording:
        prepare(make_plan(load_config(None, [*sets, "data.val_fraction=0.3"])))
        recording.add("ack", "prepared")
    return recording


def test_a_preparation_survives_a_cut_at_any_moment(
    recorded_preparation: Recording, tmp_path: Path, figures: Figures
) -> None:
    assert violations_of_data(recorded_preparation, tmp_path / "scratch") == set()
    count = violations_of_data.states  # type: ignore[attr-defined]
    assert count > 40
    figures(f"power loss while preparing: {len(recorded_preparation.operations)} operations,"
            f" {count} states, every finished folder whole")  # fmt: skip


@pytest.mark.parametrize("site", ["atomic_write", "sync_folder of atomic_write",
                                  "sync_folder of make_folder"])  # fmt: skip
def test_each_fsync_of_a_preparation_is_needed(
    recorded_preparation: Recording, tmp_path: Path, site: str
) -> None:
    poorer = recorded_preparation.without(site)
    assert violations_of_data(poorer, tmp_path / "scratch")
