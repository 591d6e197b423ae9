"""kill -9 at any moment, inside a save too: the resumed run ends with the same bits."""

import os
import random
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from gptcli import atomic
from gptcli.config import Config
from support.processes import die, forked, wait
from support.runs import LONG, THOROUGH, Figures, Tiny, Trained, finish, result_of

KILLS = 500 if LONG else 50
IN_A_SAVE = KILLS * 3 // 10


class DyingAt:
    """Ends this process before the given call of those that write files."""

    def __init__(self, call: int) -> None:
        self.left = call

    def spoil(self) -> None:
        """Wrap what `durable` calls."""
        file = atomic._Remembering
        names = ((os, "fsync"), (os, "replace"), (os, "link"), (os, "unlink"), (file, "write"))
        for owner, name in names:
            setattr(owner, name, self._counting(getattr(owner, name)))

    def _counting(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                die()
            return real(*args, **kwargs)

        return counted


def in_a_save(config: Config, generator: random.Random) -> int:
    """Train in a child that dies at one of its writes; return its exit code."""
    calls = generator.randint(1, 120)

    def work() -> None:
        DyingAt(calls).spoil()
        finish(config, resume=True)

    return wait(forked(work))


def at_a_moment(config: Config, generator: random.Random, seconds: float) -> int:
    """Train in a child that is killed some time after it began; return its exit code."""
    child = forked(lambda: finish(config, resume=True))
    time.sleep(generator.uniform(0, seconds))
    os.kill(child, signal.SIGKILL)
    return wait(child)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_killed_runs_end_with_the_same_bits(
    tiny: Tiny, trained: Trained, figures: Figures, optimizer: str
) -> None:
    generator = random.Random(f"kill {optimizer}")
    how = (*THOROUGH, f"optim.name={optimizer}")
    wanted = trained.straight(*how)
    began = time.perf_counter()
    assert wait(forked(lambda: finish(tiny(*how, name="timed")))) == 0
    seconds = time.perf_counter() - began
    killed = {"in a save": 0, "at a moment": 0}
    runs = 0
    while sum(killed.values()) < KILLS // 2 or killed["in a save"] < IN_A_SAVE // 2 + 1:
        broken = tiny(*how, name=f"broken-{runs}")
        runs += 1
        for _ in range(6):
            saving = generator.random() < 0.5
            kind = "in a save" if saving else "at a moment"
            code = (in_a_save(broken, generator) if saving
                    else at_a_moment(broken, generator, seconds))  # fmt: skip
            assert code in (0, -signal.SIGKILL), f"exit code {code}"
            killed[kind] += code != 0
        assert wait(forked(lambda: finish(broken, resume=True))) == 0  # noqa: B023
        assert result_of(broken) == wanted
        assert not list(broken.run_folder.rglob(".tmp-*"))
    figures(f"kill -9, {optimizer}: {killed['at a moment']} at random moments,"
            f" {killed['in a save']} inside a save; {runs} runs, all bit-identical")  # fmt: skip
