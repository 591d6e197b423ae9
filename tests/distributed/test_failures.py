"""A process of several is killed, hangs, fails or is asked to stop: nothing is lost, all end."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gptcli.config import Config
from gptcli.distributed import process_group as rendezvous
from gptcli.distributed.process_group import process_group
from gptcli.distributed.watchdog import Watchdog
from gptcli.errors import DataError
from gptcli.training import loop
from gptcli.training.signals import StopRequest
from gptcli.training.step import Stepper
from support.processes import Start, end, is_running, until, wait
from support.runs import Tiny, finish

from .test_training import MODERN, end_of, gap

KILLS = 10
STEADY = (*MODERN, "train.max_steps=40", "model.dropout=0.1", "train.save_every=5")


def status_of(config: Config) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((config.run_folder / "status.json").read_text())
    return found


def until_step(config: Config, step: int) -> None:
    """Wait until a run has logged a step."""
    metrics = config.run_folder / "metrics.jsonl"
    until(lambda: metrics.exists() and f'"step": {step},' in metrics.read_text())


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_killed_again_and_again_it_ends_with_the_same_bits(
    tiny: Tiny, start: Start, kind: str
) -> None:
    generator = random.Random(f"kill {kind}")
    how = (*STEADY, f"train.parallel={kind}")
    straight, killed = tiny(*how, name="straight"), tiny(*how, name="killed")
    began = time.monotonic()
    assert start(2, lambda rank: finish(straight)).wait() == [0, 0]
    seconds = time.monotonic() - began
    for attempt in range(KILLS // 2):
        ranks = start(2, lambda rank: finish(killed), again=attempt)
        time.sleep(generator.uniform(0.2, 1) * seconds)
        victim = generator.randrange(2)
        os.kill(ranks.pids[victim], signal.SIGKILL)
        codes = ranks.wait()
        assert codes[victim] in (-signal.SIGKILL, 0) and codes[1 - victim] in (9, 0)
    assert start(2, lambda rank: finish(killed), again=KILLS).wait() == [0, 0]
    assert gap(end_of(killed), end_of(straight)) == 0
    assert status_of(killed)["state"] == "finished"


def hanging(config: Config, rank: int, who: int) -> None:
    """Train, but for one rank, which goes to sleep in its third step."""
    real, calls = Stepper.step, [0]

    def fall_asleep() -> None:
        time.sleep(1000)

    def step(self: Stepper, stopped: Callable[[], bool]) -> Any:
        calls[0] += 1
        if rank == who and calls[0] == 3:
            fall_asleep()
        return real(self, stopped)

    Stepper.step = step  # type: ignore[method-assign]
    finish(config)


@pytest.mark.parametrize("who", [0, 1])
def test_a_hung_rank_ends_the_run_and_is_named_with_stacks(
    tiny: Tiny, start: Start, who: int
) -> None:
    config = tiny(*STEADY, "train.hang_timeout=2", name="hung")
    began = time.monotonic()
    codes = start(2, lambda rank: hanging(config, rank, who)).wait()
    assert time.monotonic() - began < 60  # and not the 1000 s that it sleeps
    assert codes[1 - who] == 9 and codes[who] in (9, -signal.SIGKILL)
    status = status_of(config)
    assert status["exit_code"] == 9 and f"rank {who} made no progress for 2 s" in status["error"]
    stacks = (config.run_folder / "stacks.txt").read_text()
    assert "in fall_asleep" in stacks.split(f"rank {who}:")[1].split(f"rank {1 - who}:")[0]
    assert start(2, lambda rank: finish(config, resume=True)).wait() == [0, 0]


def train_again_and_again(rank: int) -> None:
    """Leave groups that DDP's reducer holds for longest, whose threads may still be at work."""
    for _ in range(20):
        with process_group("cpu") as world:
            model = DistributedDataParallel(nn.Linear(4, 4))
            model(torch.ones(1, 4)).sum().backward()
            world.all_reduce_sum(1.0)
        del model


def test_nothing_waits_for_itself_when_ddp_frees_its_group(start: Start) -> None:
    assert start(2, train_again_and_again).wait() == [0, 0]


def test_a_stopped_process_is_found_too(tiny: Tiny, start: Start) -> None:
    config = tiny(*STEADY, "train.hang_timeout=2", "train.max_steps=100000", name="stopped")
    ranks = start(2, lambda rank: finish(config))
    until_step(config, 3)
    os.kill(ranks.pids[1], signal.SIGSTOP)
    assert ranks.wait() == [9, -signal.SIGKILL]
    assert "rank 1 made no progress" in status_of(config)["error"]


def test_a_rank_that_is_busy_is_waited_for(start: Start) -> None:
    def work(rank: int) -> None:
        with process_group("cpu") as world:
            with closing(Watchdog(world, 3.0, lambda message, stacks: None, lambda: None)):
                if rank == 0:
                    with world.busy():
                        time.sleep(7)
                world.all_reduce_max(rank)

    assert start(2, work).wait() == [0, 0]


@pytest.mark.parametrize("who", [0, 1])
def test_the_error_of_one_rank_is_the_end_of_all_and_stays_so(
    tiny: Tiny, start: Start, who: int
) -> None:
    config = tiny(*STEADY, name="torn")

    def work(rank: int) -> None:
        real = Stepper.step

        def step(self: Stepper, stopped: Callable[[], bool]) -> Any:
            if rank == who and self.s.state.step == 7:
                raise DataError("a shard has gone")
            return real(self, stopped)

        Stepper.step = step  # type: ignore[method-assign]
        finish(config)

    assert start(2, work).wait() == [3, 3]
    status = status_of(config)
    assert status["exit_code"] == 3 and "a shard has gone" in status["error"]
    assert ("rank 1: " in status["error"]) == (who == 1)
    said = json.loads(Path(f"error-{who}-0.json").read_text())["message"]
    assert said["errorCode"] == 3 and "a shard has gone" in said["message"]
    # torchrun would start it again, and again: it is not tried again.
    assert start(2, work, again=1).wait() == [3, 3]
    assert status_of(config)["step"] == status["step"]


def test_a_setting_that_is_refused_ends_all_with_its_code(tiny: Tiny, start: Start) -> None:
    uneven = tiny(*MODERN, "train.tokens_per_step=96")
    assert start(4, lambda rank: finish(uneven)).wait() == [2] * 4
    assert not (uneven.run_folder / "run.json").exists()
    half = tiny("dtype=float16", "train.parallel=fsdp")
    assert start(2, lambda rank: finish(half)).wait() == [2, 2]


@pytest.mark.parametrize("who", [0, 1])
def test_a_signal_to_one_stops_all_at_the_same_step(tiny: Tiny, start: Start, who: int) -> None:
    how = (*STEADY, "train.max_steps=120", "optim.schedule=constant")
    straight, stopped = tiny(*how, name="straight"), tiny(*how, name="stopped")

    def work(rank: int) -> None:
        stop = StopRequest()
        with stop.on_signals():
            for _ in loop.train(stopped, resume=True, stop=stop):
                pass
        raise SystemExit(stop.exit_code or 0)

    ranks = start(2, work)
    until_step(stopped, 5)
    os.kill(ranks.pids[who], signal.SIGTERM)
    os.kill(ranks.pids[who], signal.SIGTERM)  # as from a scheduler and from torchrun
    assert ranks.wait() == [75, 75]
    status = status_of(stopped)
    assert status["state"] == "stopped" and status["exit_code"] == 75
    assert end_of(stopped).state["step"] == status["step"] >= 5
    assert start(2, work, again=1).wait() == [75, 75]  # who restarts it has not been told to stop
    assert start(2, work).wait() == [0, 0]
    assert start(2, lambda rank: finish(straight)).wait() == [0, 0]
    assert gap(end_of(stopped), end_of(straight)) == 0


def test_a_process_that_waits_for_the_others_is_ended_by_a_signal(tiny: Tiny, start: Start) -> None:
    config = tiny(*STEADY)

    def work(rank: int) -> None:
        if rank == 1:  # which never comes
            time.sleep(60)
        stop = StopRequest()
        with stop.on_signals():
            Path("waits").touch()
            list(loop.train(config, stop=stop))

    waiting, other = start(2, work).pids
    until(Path("waits").exists)
    time.sleep(0.3)  # it has come to where it waits
    os.kill(waiting, signal.SIGTERM)
    assert wait(waiting) == -signal.SIGTERM
    end(other)


@pytest.mark.parametrize("late", [0, 1, 2])
def test_a_rank_that_does_not_come_is_named_once(
    start: Start, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, late: int
) -> None:
    monkeypatch.setattr(rendezvous, "_NOTICE_SECONDS", 0.5)

    def work(rank: int) -> None:
        if rank == late:
            time.sleep(1.5)
        with process_group("cpu"):
            pass

    assert start(3, work).wait() == [0, 0, 0]
    assert capfd.readouterr().err == f"waiting for rank {late} to start\n"


def test_a_process_that_waits_for_the_others_ends_when_its_parent_is_gone(start: Start) -> None:
    def work(rank: int) -> None:
        if rank == 0:
            time.sleep(60)  # it never comes
        Path("waits").touch()
        with process_group("cpu"):
            pass

    def launcher(rank: int) -> None:
        ranks = start(2, work)
        Path("pids").write_text(" ".join(map(str, ranks.pids)))
        ranks.wait()

    parent = start(1, launcher).pids[0]
    until(lambda: Path("waits").exists() and Path("pids").exists())
    time.sleep(0.3)
    other, waiting = map(int, Path("pids").read_text().split())
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    until(lambda: not is_running(waiting))
    os.kill(other, signal.SIGKILL)


def test_processes_whose_parent_is_gone_save_and_end(tiny: Tiny, start: Start) -> None:
    config = tiny(*STEADY, "train.max_steps=100000", name="orphaned")

    def launcher(rank: int) -> None:
        ranks = start(2, lambda rank: finish(config))
        Path("pids").write_text(" ".join(map(str, ranks.pids)))
        ranks.wait()

    parent = start(1, launcher).pids[0]
    until_step(config, 5)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    pids = [int(pid) for pid in Path("pids").read_text().split()]
    until(lambda: not any(map(is_running, pids)))
    status = status_of(config)
    assert status["state"] == "stopped" and status["exit_code"] == 75
    assert end_of(config).state["step"] == status["step"]
