"""Find runs and their checkpoints by name."""

import contextlib
import difflib
import shlex
from pathlib import Path

from gptcli import atomic
from gptcli.config.schema import Config
from gptcli.errors import CheckpointError, ConfigError
from gptcli.runs.record import BEST, LAST, METRICS, RUN, RUNS, STATUS

_MAX_NAMED = 10  # runs in a hint


def list_runs(root: Path = RUNS) -> list[Path]:
    """Return the run folders below `root`, newest first: the one that training last wrote to."""
    changed = {}
    for marker in root.glob(f"*/{RUN}"):
        times = []
        for name in (RUN, STATUS, METRICS):
            with contextlib.suppress(OSError):  # not there yet, or just removed
                times.append(marker.with_name(name).stat().st_mtime_ns)
        changed[marker.parent] = max(times, default=0)
    return sorted(changed, key=lambda folder: changed[folder], reverse=True)


def find_run(name: str | None) -> Path:
    """Return the folder of a run, given as a path or a name in runs/; None is the newest run.

    Raises:
        ConfigError: There is no such run, with the runs there are.
    """
    runs = list_runs()
    if name is None:
        if not runs:
            raise ConfigError("no run in runs/", "train one first, or name a run folder")
        return runs[0]
    for folder in (Path(name), RUNS / name):
        if atomic.is_file(folder / RUN):
            return folder
    names = [folder.name for folder in runs]
    near = difflib.get_close_matches(name, names, n=1)
    shown = ", ".join(names[:_MAX_NAMED]) + ", ..." * (len(names) > _MAX_NAMED)
    hint = f"did you mean {near[0]}?" if near else f"runs here: {shown or 'none'}"
    if atomic.is_folder(Path(name)):
        raise ConfigError(f"{name}: the folder holds no run ({RUN} is missing)", hint)
    raise ConfigError(f"{name}: no such run folder or run", hint)


def find_checkpoint(name: str | None, config: Config | None = None) -> Path:
    """Return the file that `--checkpoint` names: a file, a run folder or a run name.

    `best.pt` or `last.pt` that is no file here is the newest run's; None is the best of `config`'s
    run if there is one, else of the newest run.

    Raises:
        CheckpointError: There is no such checkpoint, with the runs there are.
    """
    if name is None:
        if config is not None and (config.name or config.run_dir):
            own = config.run_folder / BEST
            if own.is_file():
                return own
        return _newest_run() / BEST
    path = Path(name)
    run = run_named(name)
    if atomic.is_file(path) and (run is None or path.suffix == ".pt"):
        return path
    if name in (BEST, LAST):
        return _newest_run(f"{name}: no such file here, and ") / name
    for folder in (path, run):
        if folder is not None and _holds_run(folder):
            saved = sorted((folder / "checkpoints").glob("step-*.pt"), reverse=True)
            for file in (folder / BEST, folder / LAST, *saved):
                if file.is_file():
                    return file
            raise CheckpointError(f"{folder}: the run has no checkpoint yet")
    runs = ", ".join(folder.name for folder in list_runs()) or "none"
    raise CheckpointError(f"{name}: no such checkpoint, run folder or run", f"runs here: {runs}")


def run_named(name: str) -> Path | None:
    """Return the folder of the run with this name, if there is one below `runs/`."""
    return RUNS / name if name == Path(name).name and _holds_run(RUNS / name) else None


def _holds_run(folder: Path) -> bool:
    return atomic.is_file(folder / RUN) or atomic.is_file(folder / BEST)


def _newest_run(what: str = "") -> Path:
    for folder in list_runs():
        if (folder / BEST).is_file():
            return folder
    raise CheckpointError(
        f"{what}no run with a checkpoint in runs/",
        "train one first, or name the path of a checkpoint with --checkpoint",
    )


def next_commands(checkpoint: str, *, is_validated: bool) -> list[str]:
    """Return the commands that use a trained model; eval needs a split that its data have."""
    split = [] if is_validated else ["--split", "train"]
    commands = (["generate", "--checkpoint", checkpoint], ["eval", checkpoint, *split])
    return [shlex.join(["gpt", *words]) for words in commands]
