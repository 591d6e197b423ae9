"""How threads wait for each other on a CPU: spinning, or asleep while other programs compute.

A thread that sleeps takes 50 us to wake, longer than many a product of a small model; one that
spins holds a core that, beside a busy program, the thread it waits for would need. libgomp, which
torch's wheels for Linux bring, reads once how long to spin, but lets threads sleep at once while
there are more of them than cores. So a team of threads that do nothing decides, by being there.
"""

import contextlib
import ctypes
import os
import threading
import time
from pathlib import Path

from gptcli import SPINNING

_PERIOD = 0.25  # seconds between two readings
# Of that time, for which a thread could run and had no core: at most 0.1 on an idle machine, and
# at least 0.3 beside one busy program, whether threads spin or sleep.
_DISTURBED, _QUIET = 0.25, 0.12
_PAUSES = 50  # at least so long between two readings as one takes, of many threads
_QUIET_READINGS = 4  # after a disturbance, until threads spin again
_is_watching = False


def watch() -> None:
    """From now on, let OpenMP's threads spin while this process has its cores to itself.

    Nothing is done where the user settled how they wait, and where another OpenMP than libgomp is
    used. Where the system does not tell how long threads waited for a core, they sleep.
    """
    global _is_watching
    is_ours = all(os.environ.get(name) == value for name, value in SPINNING.items())
    gomp = None if _is_watching or not is_ours else _libgomp()
    if gomp is None or gomp.omp_get_num_procs() == 1 or _is_bounded():
        return
    _is_watching = True
    idlers = Idlers(gomp)
    with contextlib.suppress(RuntimeError):  # no more threads can be had here: all spin
        idlers.come()
        if _delays():
            threading.Thread(target=_watch, args=(idlers,), daemon=True, name="waiting").start()


def _forget() -> None:
    global _is_watching
    _is_watching = False


if hasattr(os, "register_at_fork"):  # threads do not follow into a forked process
    os.register_at_fork(after_in_child=_forget)


class Idlers:
    """A team of threads that do nothing: while it is there, all others sleep when they wait."""

    def __init__(self, gomp: ctypes.CDLL) -> None:
        """Make none yet."""
        self._gomp, self._over = gomp, threading.Event()
        self._thread: threading.Thread | None = None

    def come(self) -> None:
        """Return once there are more threads than cores; a RuntimeError if they cannot be had."""
        if self._thread is not None:
            return
        n_threads = self._gomp.omp_get_num_procs() + 1
        _require_threads(n_threads + 1)
        is_here, self._over = threading.Event(), threading.Event()
        arguments = n_threads, is_here, self._over
        thread = threading.Thread(target=self._idle, args=arguments, daemon=True)
        thread.start()
        is_here.wait()
        self._thread = thread

    def _idle(self, n_threads: int, is_here: threading.Event, over: threading.Event) -> None:
        # A team lasts as long as the thread that made it; its work is to free nothing.
        self._gomp.GOMP_parallel(ctypes.CDLL(None).free, None, n_threads, 0)
        is_here.set()
        over.wait()

    def go(self) -> None:
        """Let them end: a moment after this returns they are gone."""
        if self._thread is not None:
            self._over.set()
            self._thread.join()
            self._thread = None


def _is_bounded() -> bool:
    """Tell whether addresses are bounded (ulimit -v): a thread that finds none never starts."""
    import resource

    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY


def _require_threads(n: int) -> None:
    """Raise RuntimeError if this process may not have n more threads: libgomp would end it."""
    over = threading.Event()
    try:
        for _ in range(n):
            threading.Thread(target=over.wait, daemon=True).start()
    finally:
        over.set()


def _watch(idlers: Idlers) -> None:
    """Read from time to time for how long threads waited for a core, and act on it."""
    before, at, n_quiet, pause = _delays(), time.perf_counter(), _QUIET_READINGS - 1, _PERIOD
    while True:
        time.sleep(pause)
        began = time.perf_counter()
        now, read_at = _delays(), time.perf_counter()
        worst = max((delay - before.get(thread, delay) for thread, delay in now.items()), default=0)
        share = worst / 1e9 / (read_at - at)
        pause = max(_PERIOD, _PAUSES * (read_at - began))
        before, at = now, read_at
        n_quiet = n_quiet + 1 if share < _QUIET else 0
        with contextlib.suppress(RuntimeError):
            if share > _DISTURBED:
                idlers.come()
            elif n_quiet >= _QUIET_READINGS:
                idlers.go()


def _delays() -> dict[str, int]:
    """Return for how many nanoseconds each thread of this process has waited for a core."""
    found = {}
    with contextlib.suppress(OSError):
        for thread in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError, ValueError):  # one may have ended
                ran, waited, _ = (thread / "schedstat").read_text().split()
                if int(ran):  # else the system counts nothing
                    found[thread.name] = int(waited)
    return found


def _libgomp() -> ctypes.CDLL | None:
    """Return the loaded libgomp, or None if not exactly one is loaded."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/maps").read_text().splitlines()
        paths = {line.split(maxsplit=5)[5] for line in lines if "libgomp" in line}
        if len(paths) == 1:
            gomp = ctypes.CDLL(paths.pop())
            gomp.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_uint] * 2]
            gomp.GOMP_parallel.restype = None
            return gomp
    return None
