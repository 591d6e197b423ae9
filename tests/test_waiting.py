"""How threads wait for each other: asleep beside other programs, else spinning."""

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
torch.set_num_threads(waiting._libgomp().omp_get_num_procs())

def seconds_of_waiting(at_most):
    torch.ones(1 << 20).mul_(2)
    before, at = time.process_time(), time.perf_counter()
    while time.process_time() - before < 0.1 and time.perf_counter() - at < at_most:
        time.sleep(0.05)  # beside busy programs a core is not had at once
    return round(time.process_time() - before, 2)

spinning = seconds_of_waiting(10)
n_threads = len(waiting._delays())
idlers.come()
idlers.come()
sleeping = seconds_of_waiting(0.3)
assert len(waiting._delays()) > n_threads
idlers.go()
idlers.go()
while len(waiting._delays()) > n_threads:  # a thread ends a moment after it is joined
    time.sleep(0.01)
print(spinning, sleeping, seconds_of_waiting(10))
"""


@pytest.mark.skipif(sys.platform != "linux" or not waiting._delays(), reason="only Linux tells")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core has nothing to wait for")
def test_threads_sleep_while_idlers_are_there() -> None:
    env = os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": str(10**12)}
    command = [sys.executable, "-c", MEET]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    spinning, sleeping, again = map(float, done.stdout.split())
    assert min(spinning, again) >= 0.1 and sleeping < 0.05, done.stdout


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
    idlers, clock, waited = Told(), [0.0], [0.0]
    left, states = iter(shares), list[bool]()

    def sleep(seconds: float) -> None:
        states.append(idlers.are_here[-1])
        share = next(left, None)
        if share is None:
            raise SystemExit
        clock[0] += seconds
        waited[0] += share * seconds

    monkeypatch.setattr(waiting, "_delays", lambda: {"1": 0, "2": int(waited[0] * 1e9)})
    monkeypatch.setattr(waiting.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(waiting.time, "sleep", sleep)
    with pytest.raises(SystemExit):
        idlers.come()
        waiting._watch(idlers)  # type: ignore[arg-type]
    return states


def test_a_quiet_start_spins_and_a_disturbance_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    assert watched([0.0], monkeypatch) == [True, False]
    assert watched([0.4, 0.4], monkeypatch) == [True, True, True]
    quiet = [0.0, 0.0, 0.4, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert watched(quiet, monkeypatch) == [True, False, False, True, True, True, True, False, False]
    between = [0.0, 0.2, 0.4, 0.2, 0.2, 0.2, 0.2, 0.2]  # neither quiet nor disturbed
    assert watched(between, monkeypatch) == [True, False, False, *[True] * 6]


class Gomp:
    """A libgomp that makes no threads."""

    def __init__(self, n_procs: int = 2) -> None:
        self.n_procs, self.teams = n_procs, list[int]()

    def omp_get_num_procs(self) -> int:
        return self.n_procs

    def GOMP_parallel(self, work: object, data: object, n_threads: int, flags: int) -> None:
        self.teams.append(n_threads)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the threads that were started to watch."""
    names: list[str] = []
    monkeypatch.setattr(waiting, "_watch", lambda idlers: names.append("watch"))
    monkeypatch.setattr(waiting, "_delays", lambda: {"1": 0})
    monkeypatch.setattr(waiting, "_is_watching", False)
    for name, value in SPINNING.items():
        monkeypatch.setenv(name, value)
    return names


def test_a_process_watches_once(started: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "_libgomp", Gomp)
    waiting.watch()
    waiting.watch()
    assert started == ["watch"]
    waiting._forget()  # as in a forked process, which has none of its parent's threads
    waiting.watch()
    assert started == ["watch", "watch"]


def test_nobody_watches_where_the_user_settled_it_or_there_is_one_core(
    started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gomp = Gomp(n_procs=1)
    monkeypatch.setattr(waiting, "_libgomp", lambda: gomp)
    waiting.watch()
    gomp.n_procs = 2
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    waiting.watch()
    assert started == [] and gomp.teams == []


def test_threads_sleep_for_good_where_the_system_tells_nothing(
    started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gomp = Gomp()
    monkeypatch.setattr(waiting, "_libgomp", lambda: gomp)
    monkeypatch.setattr(waiting, "_delays", dict)
    waiting.watch()
    assert started == [] and gomp.teams == [3]


def test_a_process_that_may_not_have_more_threads_goes_on(
    started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gomp, start, n_left = Gomp(), threading.Thread.start, [2]

    def fail(self: threading.Thread) -> None:
        n_left[0] -= 1
        if n_left[0] < 0:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(waiting, "_libgomp", lambda: gomp)
    monkeypatch.setattr(threading.Thread, "start", fail)
    waiting.watch()  # libgomp would have ended the process
    assert started == [] and gomp.teams == []
