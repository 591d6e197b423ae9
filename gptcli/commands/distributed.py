"""What `gpt train` does about several processes: start them, and keep all but the first quiet."""

import os
import sys
from typing import TYPE_CHECKING, NoReturn

import typer

from gptcli.distributed.environment import ALONE, Place, place, report
from gptcli.errors import ConfigError, GptError
from gptcli.terminal import console

if TYPE_CHECKING:
    from gptcli.config import Config


def place_for(arguments: list[str]) -> Place:
    """Return which of several processes this is, for a command that is done by several."""
    try:
        return place() if arguments[:1] == ["train"] else ALONE
    except ConfigError:  # train says so itself
        return ALONE


def prefix(place: Place) -> str:
    """Return what an error of this process begins with: which of several it is."""
    return "" if place.is_main else f"rank {place.rank}: "


def may_print_json(place: Place, arguments: list[str]) -> bool:
    """Tell whether this process prints the object of `--json` when it fails.

    With --gpus, the launcher does, for the processes may be restarted.
    """
    return place.is_main and not (place.size > 1 and "--gpus" in arguments)


def leave(code: int) -> NoReturn:
    """End this process without taking apart what torch set up for several.

    Its threads outlive the interpreter now and then, which torchrun takes for a crash.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def failed(error: GptError) -> int:
    """Let the launcher know why this process fails; return the exit code for it."""
    report(error.message, error.exit_code, error.hint)
    # The run is whole: torchrun must not start it again because nobody can read of it.
    return 0 if isinstance(error, console.OutputLostError) else error.exit_code


def launch(config: "Config", n_processes: int, *, resume: bool) -> None:
    """Do this process's command line in several, and end as they do.

    Args:
        config: The run.
        n_processes: At least 2.
        resume: Whether it goes on; a fresh run is checked first, while there is one process.

    Raises:
        GptError: The configuration, the data or the machine does not allow it.
        DistributedError: The processes ended without saying why.
    """
    from gptcli.device import resolve_auto
    from gptcli.distributed.launch import launch as start
    from gptcli.distributed.launch import require_devices, require_files
    from gptcli.errors import EXIT_DISTRIBUTED, DistributedError, PeerError
    from gptcli.runs.folder import Run
    from gptcli.training.plan import plan

    require_files(n_processes)
    require_devices(n_processes, resolve_auto(config).device)
    if not resume:
        plan(config, n_processes)
    run = Run(config.run_folder)
    before = run.read_status()
    ended = start(sys.argv[1:], n_processes)
    if ended.exit_code == 0:
        return
    status = run.read_status()
    if status != before and status.get("exit_code"):
        if status["state"] == "stopped":
            raise typer.Exit(status["exit_code"])
        raise PeerError(status.get("error", ended.message), status["exit_code"], ended.hint)
    if ended.is_stopped:  # before there was anything to save
        message = f"{ended.message} before training began; nothing has changed"
        console.message(message)
        raise PeerError(message, ended.exit_code or 0)
    if ended.exit_code:  # before there was a run, or after it
        raise PeerError(ended.message, ended.exit_code, ended.hint)
    if status:
        run.write_failure(EXIT_DISTRIBUTED, ended.message)
    raise DistributedError(ended.message, "go on from the last checkpoint with --resume")
