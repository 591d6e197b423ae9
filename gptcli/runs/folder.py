"""Write a run folder: its lock, the small files that describe the run, its checkpoints' names.

runs/<name>/{config.yaml, run.json, status.json, metrics.jsonl, samples.jsonl, log.txt,
checkpoints/step-*.pt, best.pt, last.pt}
"""

import contextlib
import json
import os
import re
import socket
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from gptcli import atomic, locking
from gptcli.config.schema import Config
from gptcli.config.yaml import dump_yaml
from gptcli.errors import EXIT_BUG, ConfigError, GptError, StorageError
from gptcli.formatting import moment
from gptcli.runs import record
from gptcli.runs.read import metrics_row, read_rows
from gptcli.runs.record import BEST, CONFIG, LAST, LOG, METRICS, RUN, SAMPLES, STATUS

_STEP_FILE = re.compile(r"step-(\d{8})\.pt\Z")


class Run:
    """An open run folder, held by this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self._identity = _identity(folder)

    def require_same_folder(self) -> None:
        """Raise StorageError where the path leads to another folder than when it was opened."""
        if _identity(self.folder) not in (self._identity, None):
            raise StorageError(
                f"{self.folder}: another folder has replaced the run's",
                "move the run's folder back, then run the same command with --resume",
            )

    def step_file(self, step: int) -> Path:
        """Return the name of the checkpoint after `step` steps."""
        return self.checkpoints / f"step-{step:08d}.pt"

    def step_files(self) -> list[Path]:
        """Return the checkpoints there are, newest first."""
        if not self.checkpoints.is_dir():
            return []
        files = [path for path in self.checkpoints.iterdir() if _STEP_FILE.match(path.name)]
        return sorted(files, reverse=True)

    def link_newest(self, step: int, best_step: int | None) -> None:
        """Link last.pt to the newest checkpoint, after `step` steps; best.pt if that changed it."""
        for name, linked in ((LAST, step), (BEST, best_step)):
            is_due = linked == step or not (self.folder / name).exists()
            if is_due and linked is not None and self.step_file(linked).is_file():
                atomic.link(self.step_file(linked), self.folder / name)

    def retain(self, keep_last: int) -> None:
        """Remove all but the newest checkpoints; best.pt is a link that stays."""
        for path in self.step_files()[keep_last:]:
            with atomic.storage_errors(path):
                path.unlink(missing_ok=True)

    def set_aside(self, files: list[Path]) -> None:
        """Rename checkpoints that cannot be resumed from, so that none counts as the newest."""
        for path in files:
            with atomic.storage_errors(path):
                path.rename(path.with_name(f"{path.name}.damaged"))
        if files and (kept := self.step_files()):
            atomic.link(kept[0], self.folder / LAST)

    def places(self) -> dict[str, Any]:
        """Return the run folder and its best checkpoint, for a summary."""
        paths = [self.folder / name for name in (BEST, LAST)]
        checkpoint = next((str(path) for path in paths if path.exists()), None)
        return {"run_dir": str(self.folder), "checkpoint": checkpoint}

    def write_config(self, config: Config) -> None:
        """Write config.yaml, in which every value is settled."""
        text = dump_yaml(config.model_dump(mode="json"))
        atomic.write_bytes(self.folder / CONFIG, text.encode())

    def write_status(self, state: str, step: int, exit_code: int | None, **more: Any) -> None:
        """Write status.json, which repeats the exit code (torchrun hides it)."""
        status = {"state": state, "step": step, "exit_code": exit_code, "pid": os.getpid(),
                  "host": socket.gethostname(), "time": moment(), **more}  # fmt: skip
        _write_json(self.folder / STATUS, status)

    def write_failure(self, exit_code: int, message: str) -> None:
        """Write status.json of a run that failed, which keeps how far it was and its times."""
        before = self.read_status()
        times = {key: before[key] for key in ("seconds_by_work",) if key in before}
        self.write_status("failed", before.get("step", 0), exit_code, error=message, **times)

    def read_status(self) -> dict[str, Any]:
        """Return status.json, empty if it cannot be read."""
        try:
            status = json.loads(atomic.read_bytes(self.folder / STATUS))
            return status if isinstance(status, dict) else {}
        except (OSError, ValueError, RecursionError):
            return {}

    def log(self, text: str) -> None:
        """Append lines to log.txt."""
        atomic.append(self.folder / LOG, f"{moment()} {text}\n")

    def append(self, name: str, line: dict[str, Any], *, again: bool = False) -> None:
        """Append a line to metrics.jsonl or samples.jsonl.

        With `again`, it replaces the evaluation or the sample of its step.
        """
        self.require_same_folder()
        path, text = self.folder / name, json.dumps(line) + "\n"
        if again and path.exists():
            rows = self._rows(name, [])
            kept = [old for old, row in rows if row.step != line["step"] or not _observes(row)]
            atomic.write_bytes(path, b"".join([*kept, text.encode()]))
        else:
            atomic.append(path, text)

    def sync_metrics(self) -> None:
        """Flush metrics and samples, so that no checkpoint is newer than its history."""
        for path in (self.folder / METRICS, self.folder / SAMPLES):
            if path.exists():
                atomic.sync_file(path)

    def cut_history(self, step: int) -> tuple[list[str], list[str]]:
        """Drop what a run resumed at `step` will log again, and what cannot be read.

        Returns:
            The files with an evaluation or a sample of `step` itself, which stays until it is
            replaced, and what was left out.
        """
        observed: list[str] = []
        problems: list[str] = []
        for name in (METRICS, SAMPLES):
            if (self.folder / name).exists():
                kept = [(line, row) for line, row in self._rows(name, problems) if row.step <= step]
                observed += [name for _, row in kept if row.step == step and _observes(row)]
                atomic.write_bytes(self.folder / name, b"".join(line for line, _ in kept))
        return observed, problems

    def _rows(self, name: str, problems: list[str]) -> Iterator[tuple[bytes, Any]]:
        path, parse = self.folder / name, record.TextSample.model_validate
        with atomic.create_errors(path):  # it is about to be rewritten
            content = atomic.read_bytes(path)
        return read_rows(path, content, metrics_row if name == METRICS else parse, problems)


def _identity(folder: Path) -> tuple[int, int] | None:
    """Return the device and inode of a folder; None if it does not exist."""
    with contextlib.suppress(OSError):
        return (status := folder.stat()).st_dev, status.st_ino
    return None


def _observes(row: object) -> bool:
    """Tell whether a line is about the model as it was at its step, and can be made again."""
    return isinstance(row, record.Evaluation | record.TextSample)


def _skip(*arguments: Any, **more: Any) -> None: ...


class ReadOnlyRun(Run):
    """The run folder as ranks other than 0 see it: they write nothing."""

    link_newest = retain = set_aside = write_config = write_status = log = append = _skip
    sync_metrics = _skip


@contextlib.contextmanager
def open_run(config: Config, *, resume: bool, overwrite: bool) -> Iterator[Run]:
    """Lock the run folder of `config`, creating it if necessary.

    If it holds a run, `resume` continues there and `overwrite` renames it to `<name>~N`.

    Raises:
        ConfigError: The folder holds a run, or something else, that must not be overwritten.
        RunLockedError: Another process trains in it.
        StorageError: It may not be written.
    """
    folder = config.run_folder
    hint = "wait for it, stop it, or choose another -s name=..."
    lock = partial(locking.hold, folder, "is training in this folder", hint)
    taken = ConfigError(
        f"{folder} already holds a run",
        "resume it with --resume, rename it with --overwrite, or choose another -s name=...",
    )
    if not (folder / RUN).is_file():
        _refuse_foreign(folder)
    elif not resume:
        with lock():  # that another process trains there is the better reason
            pass
        if not overwrite:
            raise taken
        atomic.set_aside(folder)
    checkpoints = folder / "checkpoints"
    atomic.make_folder(checkpoints)
    if checkpoints.is_symlink():  # old checkpoints are removed there
        raise StorageError(
            f"{checkpoints}: is a symbolic link, which is not followed",
            "link the run folder as a whole, or name another with -s run_dir=...",
        )
    with lock():
        if not resume and (folder / RUN).is_file():  # another process has just started one
            raise taken
        atomic.remove_leftovers(folder)
        atomic.remove_leftovers(checkpoints)
        run = Run(folder)
        try:
            yield run
        except Exception as error:
            code = error.exit_code if isinstance(error, GptError) else EXIT_BUG
            text = error.message if isinstance(error, GptError) else repr(error)
            if (folder / RUN).is_file():  # before that, there is no run to fail
                with contextlib.suppress(GptError, OSError):  # the first failure matters more
                    run.write_failure(code, text)
            raise


def describe_run(run: Run, facts: dict[str, Any]) -> None:
    """Write run.json once: time, command, versions, machine and data."""
    if not (run.folder / RUN).exists():
        _write_json(run.folder / RUN, {"created": moment(), "command": sys.argv[1:], **facts})


def _refuse_foreign(folder: Path) -> None:
    """Refuse a folder with files that a run would overwrite although no run wrote them."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file, not a run folder", "choose another -s name=...")
    ours = (CONFIG, METRICS, SAMPLES, STATUS, LOG, BEST, LAST)
    found = [name for name in ours if (folder / name).exists()]
    if found and not (folder / RUN).is_file():  # else another process has just started one
        raise ConfigError(
            f"{folder} holds {found[0]} but no run ({RUN} is missing)",
            "choose another folder with -s name=... or -s run_dir=...",
        )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    atomic.write_bytes(path, (json.dumps(value, indent=1) + "\n").encode())
