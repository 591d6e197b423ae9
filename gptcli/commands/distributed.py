"""What `gpt train` does about several processes: start them, and keep all but the first quiet."""

import os
import sys
from typing import TYPE_CHECKING, NoReturn

import typer

from gptcli import console

if TYPE_CHECKING:
    from gptcli.config import Config


def is_rank() -> bool:
    """Tell whether this process is one that torchrun, or another launcher, started."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE") or 1) > 1


def speaks() -> bool:
    """Tell whether this process draws and prints: alone, or the first of several."""
    return not is_rank() or os.environ["RANK"] == "0"


def may_prepare() -> bool:
    """Tell whether this process prepares data that is not there yet, of all that want it."""
    return speaks()


def prefix() -> str:
    """Return what an error of this process begins with: which of several it is."""
    return "" if speaks() else f"rank {os.environ['RANK']}: "


def may_print_json(arguments: list[str]) -> bool:
    """Tell whether this process prints the object of `--json` when it fails.

    With --gpus, whoever started the processes does, for they may be started again.
    """
    return speaks() and not (is_rank() and "--gpus" in arguments)


def leave(code: int) -> NoReturn:
    """End this process without taking apart what torch set up for several.

    Its threads outlive the interpreter now and then, which torchrun takes for a crash.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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
    from gptcli.device import settle
    from gptcli.distributed.launch import launch as start
    from gptcli.distributed.launch import require_devices
    from gptcli.errors import EXIT_DISTRIBUTED, DistributedError, PeerError
    from gptcli.training.plan import plan
    from gptcli.training.run import Run

    require_devices(n_processes, settle(config).device)
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
        raise PeerError(status.get("error", ended.message), status["exit_code"])
    if ended.is_stopped:  # before there was anything to save
        console.message(f"{ended.message} before training began; nothing has changed")
        raise typer.Exit(ended.exit_code or 0)
    if ended.exit_code:  # before there was a run
        raise PeerError(ended.message, ended.exit_code)
    if status:
        run.write_status("failed", status["step"], EXIT_DISTRIBUTED, error=ended.message)
    raise DistributedError(ended.message, "go on from the last checkpoint with --resume")
