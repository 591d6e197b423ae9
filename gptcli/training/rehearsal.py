"""The first steps of a run on its real data, timed; nothing of them is kept or written."""

import contextlib
import time
from dataclasses import dataclass

from gptcli.config.schema import Config
from gptcli.device import memory_bytes, synchronize
from gptcli.distributed.world import World
from gptcli.training.run import Follower
from gptcli.training.session import start
from gptcli.training.step import Stepper

STEPS = 3


@dataclass(frozen=True)
class Rehearsal:
    """What the first steps took.

    Attributes:
        step: Steps that were done before, by a run that is resumed.
        rows: Of a micro-batch, found out if the configuration leaves that open.
        seconds_per_step: Without the first step, in which memory is asked for.
        setup_seconds: Of reading, building and compiling.
        memory_bytes: The most that was used.
        notes: What the run would have noted at its start.
    """

    step: int
    rows: int
    seconds_per_step: float
    setup_seconds: float
    memory_bytes: int
    notes: tuple[str, ...]


def rehearse(config: Config, *, resume: bool = False, n_steps: int = STEPS) -> Rehearsal:
    """Do the next steps of a run, in this process alone, and time them.

    Args:
        config: The run.
        resume: Go on from its newest checkpoint.
        n_steps: To do; fewer if the run has fewer left.

    Raises:
        GptError: As training does.
    """
    began = time.perf_counter()
    run = Follower(config.run_folder)
    with contextlib.closing(start(run, config, World(), resume=resume)) as session:
        done = session.state.step
        stepper = Stepper(session)
        with contextlib.closing(stepper.feed):
            setup_seconds = time.perf_counter() - began
            times = []
            for _ in range(min(n_steps, session.max_steps - done)):
                began = time.perf_counter()
                stepper.step(lambda: False)
                synchronize(session.compute.device)
                times.append(time.perf_counter() - began)
                session.state.step += 1
        timed = times[1:] or times
        return Rehearsal(
            step=done,
            rows=session.rows,
            seconds_per_step=sum(timed) / len(timed) if timed else 0.0,
            setup_seconds=setup_seconds,
            memory_bytes=memory_bytes(session.compute.device),
            notes=tuple(session.notes),
        )
