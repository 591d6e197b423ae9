"""What a run does about its other processes: it tells them why it fails, and ends if one hangs."""

import contextlib
import os
from collections.abc import Iterator

from gptcli import atomic
from gptcli.config.schema import Config
from gptcli.distributed.environment import report
from gptcli.distributed.process_group import World
from gptcli.distributed.watchdog import Hang, Watchdog
from gptcli.errors import (
    EXIT_BUG,
    EXIT_DISTRIBUTED,
    EXIT_PREEMPTED,
    DistributedError,
    GptError,
)
from gptcli.runs.folder import Run
from gptcli.training.signals import StopRequest

STACKS = "stacks.txt"


def start_watchdog(world: World, config: Config, stop: StopRequest) -> Watchdog:
    """Watch over a run of several processes until the watchdog is closed.

    A hang ends it with exit code 9, in status.json and log.txt too, with where each process stood
    in stacks.txt. A process whose parent is gone saves and ends.
    """

    def on_hang(hang: Hang) -> None:
        run = Run(config.run_folder)
        with contextlib.suppress(GptError, OSError):
            atomic.write_bytes(run.folder / STACKS, hang.stacks.encode())
            run.write_failure(EXIT_DISTRIBUTED, hang.message)
            run.log(f"{hang.message}\n{hang.stacks}")
        hint = f"the stack of each process is in {run.folder / STACKS}; rerun with --resume"
        report(hang.message, EXIT_DISTRIBUTED, hint)
        with contextlib.suppress(OSError):
            os.write(2, f"error: {hang.message}\nhint: {hint}\n".encode())

    def on_orphaned() -> None:
        stop.request(EXIT_PREEMPTED)

    return Watchdog(world, config.train.hang_timeout, on_hang, on_orphaned)


@contextlib.contextmanager
def propagate_to_peers(world: World) -> Iterator[None]:
    """Tell the other processes why this one fails; what all of them find, the first one says.

    Raises:
        GptError: As the block does; of a process that is gone, why it is.
    """
    try:
        with world.peer_errors():
            if (last_words := world.peer_failure()) is not None:  # of those started before
                raise last_words
            yield
    except GptError as error:
        if not isinstance(error, DistributedError):  # of another process: it may be tried again
            who = "" if world.is_main else f"rank {world.rank}: "
            if not world.post_failure(who + error.message, error.exit_code, error.hint):
                raise (world.peer_failure() or error) from error
        raise
    except Exception as error:
        world.post_failure(repr(error), EXIT_BUG)
        raise


@contextlib.contextmanager
def report_to_torchrun() -> Iterator[None]:
    """Let torchrun know why this process fails, if torchrun started it."""
    try:
        yield
    except GptError as error:
        report(error.message, error.exit_code, error.hint)
        raise
    except Exception as error:
        report(repr(error), EXIT_BUG, None)
        raise
