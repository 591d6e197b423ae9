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
_QUIET_READINGS = 4  # after a disturbance, until threads spin again
_is_watching = False


def watch() -> None:
    """From now on, let OpenMP's threads spin while this process has its cores to itself.

    Nothing is done where the user settled how they wait, where another OpenMP than libgomp is used,
    or where the system does not tell what threads wait for; a process watches once.
    """
    global _is_watching
    is_ours = all(os.environ.get(name) == value for name, value in SPINNING.items())
    if _is_watching or not is_ours or not _delays() or (gomp := _libgomp()) is None:
        return
    _is_watching = True
    threading.Thread(target=_watch, args=(Idlers(gomp),), daemon=True, name="waiting").start()


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
        """Return once there are more threads than cores."""
        if self._thread is not None:
            return
        is_here, self._over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._idle, args=(is_here, self._over), daemon=True)
        self._thread.start()
        is_here.wait()

    def _idle(self, is_here: threading.Event, over: threading.Event) -> None:
        # A team lasts as long as the thread that made it; its work is to free nothing.
        self._gomp.GOMP_parallel(ctypes.CDLL(None).free, None, len(os.sched_getaffinity(0)) + 1, 0)
        is_here.set()
        over.wait()

    def go(self) -> None:
        """Return once they are gone."""
        if self._thread is not None:
            self._over.set()
            self._thread.join()
            self._thread = None


def _watch(idlers: Idlers) -> None:
    idlers.come()
    before, at, n_quiet = _delays(), time.perf_counter(), _QUIET_READINGS - 1
    while True:
        time.sleep(_PERIOD)
        now, read_at = _delays(), time.perf_counter()
        worst = max((delay - before.get(thread, delay) for thread, delay in now.items()), default=0)
        share = worst / 1e9 / (read_at - at)
        before, at = now, read_at
        n_quiet = n_quiet + 1 if share < _QUIET else 0
        if share > _DISTURBED:
            idlers.come()
        elif n_quiet >= _QUIET_READINGS:
            idlers.go()


def _delays() -> dict[str, int]:
    """Return for how many nanoseconds each thread of this process has waited for a core."""
    found = {}
    with contextlib.suppress(OSError):
        for thread in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError, ValueError, IndexError):  # one may have ended
                found[thread.name] = int((thread / "schedstat").read_text().split()[1])
    return found


def _libgomp() -> ctypes.CDLL | None:
    """Return the libgomp that is loaded, None where there is none or more than one."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/maps").read_text().splitlines()
        paths = {line.split(maxsplit=5)[5] for line in lines if "libgomp" in line}
        if len(paths) == 1:
            gomp = ctypes.CDLL(paths.pop())
            gomp.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_uint] * 2]
            gomp.GOMP_parallel.restype = None
            return gomp
    return None
