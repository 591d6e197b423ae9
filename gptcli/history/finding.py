"""Which run folder is meant, and which there are."""

import contextlib
import difflib
import shlex
from pathlib import Path

from gptcli import durable
from gptcli.errors import ConfigError
from gptcli.history.reading import METRICS, RUN, STATUS

RUNS = Path("runs")
_MOST_NAMED = 10  # runs in a hint


def list_runs(root: Path = RUNS) -> list[Path]:
    """Return the run folders below `root`, the one last written to first."""
    changed = {}
    for marker in root.glob(f"*/{RUN}"):
        times = []
        for name in (RUN, STATUS, METRICS):
            with contextlib.suppress(OSError):  # not there yet, or no more
                times.append(marker.with_name(name).stat().st_mtime_ns)
        changed[marker.parent] = max(times, default=0)
    return sorted(changed, key=lambda folder: changed[folder], reverse=True)


def find_run(name: str | None) -> Path:
    """Return the run folder that a command's RUN names.

    Args:
        name: A run folder, or the name of a run in runs/; None is the newest one there.

    Raises:
        ConfigError: There is no such run, with the runs there are.
    """
    runs = list_runs()
    if name is None:
        if not runs:
            raise ConfigError("no run in runs/", "train one first, or name a run folder")
        return runs[0]
    for folder in (Path(name), RUNS / name):
        if durable.is_file(folder / RUN):
            return folder
    names = [folder.name for folder in runs]
    near = difflib.get_close_matches(name, names, n=1)
    shown = ", ".join(names[:_MOST_NAMED]) + ", ..." * (len(names) > _MOST_NAMED)
    hint = f"did you mean {near[0]}?" if near else f"runs here: {shown or 'none'}"
    if durable.is_folder(Path(name)):
        raise ConfigError(f"{name}: the folder holds no run ({RUN} is missing)", hint)
    raise ConfigError(f"{name}: no such run folder or run", hint)


def next_commands(checkpoint: str, *, is_validated: bool) -> list[str]:
    """Return the commands that use what a run has learned.

    Args:
        checkpoint: A file or a run, as `--checkpoint` takes it.
        is_validated: Whether its data have a validation split.
    """
    split = [] if is_validated else ["--split", "train"]
    commands = (["generate", "--checkpoint", checkpoint], ["eval", checkpoint, *split])
    return [shlex.join(["gpt", *words]) for words in commands]
