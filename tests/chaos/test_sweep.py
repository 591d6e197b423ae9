"""kill -9 at any moment of a sweep: the same command ends with the table that nothing disturbed."""

import os
import random
import signal
import time

from gptcli.api.sweep import Sweep, Trial
from gptcli.config.space import read_space
from support.processes import forked, wait
from support.runs import LONG, Figures, Tiny

KILLS = 50 if LONG else 5
SPACE = ["optim.lr=1e-3..1e-2:log", "model.n_layer=1,2", "model.n_head=2,3"]
SHORT = ("train.max_steps=4", "train.save_every=1", "generate.max_new_tokens=1")


def finish(sweep: Sweep) -> list[Trial]:
    """Train what is left."""
    while (unit := sweep.next()) is not None:
        sweep.train(*unit)
    return sweep.results()


def test_a_killed_sweep_ends_with_the_same_table(tiny: Tiny, figures: Figures) -> None:
    def sweep(name: str) -> Sweep:
        base = tiny(*SHORT, name=name)
        return Sweep(base, read_space(SPACE, base), trials=12, seeds=1)

    began = time.perf_counter()
    assert wait(forked(lambda: finish(sweep("whole")))) == 0
    seconds = time.perf_counter() - began
    wanted = sweep("whole").results()
    assert len(wanted) == 12 and {one.verdict for one in wanted} >= {"best", "failed"}
    generator, killed = random.Random("sweep"), 0
    while killed < KILLS:
        name = f"broken-{killed}"
        for _ in range(5):
            child = forked(lambda: finish(sweep(name)))  # noqa: B023
            time.sleep(generator.uniform(0, seconds / 3))
            os.kill(child, signal.SIGKILL)
            killed += wait(child) == -signal.SIGKILL
        assert wait(forked(lambda: finish(sweep(name)))) == 0  # noqa: B023
        assert sweep(name).results() == wanted
    figures(f"kill -9, sweep of 12 trials: {killed} at random moments, the same table")
