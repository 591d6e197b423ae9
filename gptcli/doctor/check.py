"""What a check found; knows nothing of the checks."""

from dataclasses import dataclass
from typing import Literal

from gptcli.errors import ConfigError


@dataclass(frozen=True)
class Check:
    """What a check found.

    Attributes:
        status: `ok`; `note` where something is missing that is not always needed; `error`.
        found: What there is, in a line.
        remedy: How to mend it, or what follows from it.
        exit_code: What an error ends the program with.
    """

    status: Literal["ok", "note", "error"]
    found: str
    remedy: str | None = None
    exit_code: int = 0


def ok(found: str) -> Check:
    """Return the verdict that nothing is missing."""
    return Check("ok", found)


def warn(found: str, remedy: str) -> Check:
    """Return the verdict that something is missing that is not always needed."""
    return Check("note", found, remedy)


def fail(found: str, remedy: str, exit_code: int = ConfigError.exit_code) -> Check:
    """Return the verdict that something needed is missing."""
    return Check("error", found, remedy, exit_code)
