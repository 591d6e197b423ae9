"""Whether this machine has what the program needs, and how to mend what is missing."""

from collections.abc import Callable, Iterator

from gptcli.health import machine, surroundings
from gptcli.health.verdict import Verdict, failed

__all__ = ["Verdict", "checkup"]

_CHECKS: tuple[tuple[str, Callable[[], Verdict]], ...] = (
    ("python", machine.python),
    ("torch", machine.torch),
    ("device", machine.device),
    ("dtype", machine.dtype),
    ("compiler", machine.compiler),
    ("memory", machine.memory),
    ("shm", machine.shared_memory),
    ("open files", machine.open_files),
    ("disk", surroundings.disk),
    ("caches", surroundings.caches),
    ("tokenizer", surroundings.tokenizer),
    ("examples", surroundings.examples),
    ("network", surroundings.network),
    ("extras", surroundings.extras),
)


def checkup() -> Iterator[tuple[str, Verdict]]:
    """Check one thing after the other; yield its name and the verdict as they come."""
    for name, check in _CHECKS:
        try:
            yield name, check()
        except Exception as error:  # what breaks a check is what it was to find
            yield name, failed(f"{type(error).__name__}: {error}", "install gptcli again")
