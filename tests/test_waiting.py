"""How threads wait for each other: asleep beside other programs, else spinning."""

import itertools
import os
import subprocess
import sys
import threading

import pytest

from gptcli import SPINNING, waiting

# Two threads meet once; then one of them waits, by spinning for far longer than this lasts.
MEET = """
import time, torch
from gptcli import waiting

idlers = waiting.Idlers(waiting._libgomp())
torch.set_num_threads(len(__import__("os").sched_getaffinity(0)))

def seconds_of_waiting():
    torch.ones(1 << 20).mul_(2)
    before = time.process_time()
    time.sleep(0.3)
    return round(time.process_time() - before, 2)

n_threads = len(waiting._delays())
spinning = seconds_of_waiting()
idlers.come()
idlers.come()
sleeping = seconds_of_waiting()
assert len(waiting._delays()) > n_threads
idlers.go()
idlers.go()
print(spinning, sleeping, seconds_of_waiting())
"""


@pytest.mark.skipif(sys.platform != "linux" or not waiting._delays(), reason="only Linux tells")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core has nothing to wait for")
def test_threads_sleep_while_idlers_are_there() -> None:
    env = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": str(10**12)}
    done = subprocess.run([sys.executable, "-c", MEET], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spinning, sleeping, again = map(float, done.stdout.split())
    assert spinning > 0.1 and again > 0.1 and sleeping < 0.05, done.stdout


class Told:
    """Idlers that only tell."""

    def __init__(self) -> None:
        self.are_here: list[bool] = []

    def come(self) -> None:
        self.are_here.append(True)

    def go(self) -> None:
        self.are_here.append(False)


def watched(shares: list[float], monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Return where idlers are after each reading, of which a thread was delayed for a share."""
    idlers, clock, ns = Told(), itertools.count(), [0.0]
    left, states = iter(shares), list[bool]()

    def sleep(seconds: float) -> None:
        states.append(idlers.are_here[-1])
        share = next(left, None)
        if share is None:
            raise SystemExit
        ns[0] += share * 1e9

    monkeypatch.setattr(waiting, "_delays", lambda: {"1": 0, "2": int(ns[0])})
    monkeypatch.setattr(waiting.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(waiting.time, "sleep", sleep)
    with pytest.raises(SystemExit):
        waiting._watch(idlers)  # type: ignore[arg-type]
    return states


def test_a_quiet_start_spins_and_a_disturbance_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    assert watched([0.0], monkeypatch) == [True, False]
    assert watched([0.4, 0.4], monkeypatch) == [True, True, True]
    quiet = [0.0, 0.0, 0.4, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert watched(quiet, monkeypatch) == [True, False, False, True, True, True, True, False, False]
    between = [0.0, 0.2, 0.4, 0.2, 0.2, 0.2, 0.2, 0.2]  # neither quiet nor disturbed
    assert watched(between, monkeypatch) == [True, False, False, *[True] * 6]


def test_a_process_watches_once_and_not_where_the_user_settled_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: list[str] = []
    monkeypatch.setattr(threading.Thread, "start", lambda self: started.append(self.name))
    monkeypatch.setattr(waiting, "_libgomp", object)
    monkeypatch.setattr(waiting, "_delays", lambda: {"1": 0})
    monkeypatch.setattr(waiting, "_is_watching", False)
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    waiting.watch()
    assert started == []
    for name, value in SPINNING.items():
        monkeypatch.setenv(name, value)
    waiting.watch()
    waiting.watch()
    assert started == ["waiting"]
    waiting._forget()  # as in a forked process, which has none of its parent's threads
    waiting.watch()
    assert started == ["waiting", "waiting"]
