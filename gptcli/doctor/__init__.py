"""Whether this machine has what the program needs, and how to mend what is missing."""

from collections.abc import Callable, Iterator

from gptcli.doctor import environment, machine
from gptcli.doctor.check import Check, fail

__all__ = ["Check", "run_checks"]

_CHECKS: tuple[tuple[str, Callable[[], Check]], ...] = (
    ("python", machine.python),
    ("torch", machine.torch),
    ("device", machine.device),
    ("dtype", machine.dtype),
    ("compiler", machine.compiler),
    ("memory", machine.memory),
    ("shm", machine.shared_memory),
    ("open files", machine.open_files),
    ("disk", environment.disk),
    ("caches", environment.caches),
    ("tokenizer", environment.tokenizer),
    ("examples", environment.examples),
    ("network", environment.network),
    ("extras", environment.extras),
)


def run_checks() -> Iterator[tuple[str, Check]]:
    """Check one thing after the other; yield its name and the verdict as they come."""
    for name, check in _CHECKS:
        try:
            yield name, check()
        except Exception as error:  # what breaks a check is what it was to find
            yield name, fail(f"{type(error).__name__}: {error}", "install gptcli again")
