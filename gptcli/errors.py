"""The errors a user can cause, each with the exit code that it ends the program with.

A message says where and what, a hint says how to fix it. A broken invariant of ours is an
`assert`, and anything else is a bug: it keeps its traceback and ends with `EXIT_BUG`.
"""

import re

EXIT_DIFFERS = 1  # --verify-resume alone: resuming is not exact here
EXIT_DISTRIBUTED = 9
EXIT_BUG = 70
EXIT_PREEMPTED = 75  # sysexits.h EX_TEMPFAIL: saved, start it again
EXIT_INTERRUPTED = 130  # 128 + SIGINT: saved
_LONG_LINE = re.compile(r"(.{500}).{500,}(.{300})")


class GptError(Exception):
    """An error with a message for the user, a hint how to fix it, and an exit code."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        # The middle of a long line, which quotes what was given, is left out.
        self.message = _LONG_LINE.sub(r"\1 ... \2", message)
        self.hint = hint and _LONG_LINE.sub(r"\1 ... \2", hint)

    def __reduce__(self) -> tuple[type, tuple[str, str | None]]:
        """Keep the hint when the error comes from another process."""
        return type(self), (self.message, self.hint)


class ConfigError(GptError):
    """The command line or the configuration is wrong."""

    exit_code = 2


class CombinationError(ConfigError):
    """Settings that are each allowed do not fit together."""


class DataError(GptError):
    """A source text, a shard or a manifest cannot be used."""

    exit_code = 3


class CheckpointError(GptError):
    """A checkpoint is missing, damaged or in the wrong format."""

    exit_code = 4


class StorageError(GptError):
    """The disk is full, or reading or writing is not permitted."""

    exit_code = 5


class RunLockedError(GptError):
    """Another process is training in the run folder, or preparing the data folder."""

    exit_code = 6


class NonFiniteError(GptError):
    """The loss or a gradient is infinite or not a number."""

    exit_code = 7


class MemoryLimitError(GptError):
    """The machine or the device has not enough memory."""

    exit_code = 8


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error of Python, torch, C++ or the system means out of memory."""
    if (
        isinstance(error, MemoryError | MemoryLimitError)
        or type(error).__name__ == "OutOfMemoryError"
    ):
        return True
    signs = (
        "out of memory",  # CUDA, MPS, NCCL
        "_alloc_failed",  # cuBLAS, cuDNN
        "allocation_failed",
        "can't allocate memory",
        "cannot allocate memory",
        "bad_alloc",
        "failed to map segment",
        "can't start new thread",
        "error return without exception set",  # Python's parser, which lost its MemoryError
    )
    return any(sign in str(error).lower() for sign in signs)


class DistributedError(GptError):
    """A process of a distributed run failed or stopped responding."""

    exit_code = EXIT_DISTRIBUTED


class PeerError(DistributedError):
    """Another process of the run failed and reported why; this one ends with its exit code."""

    def __init__(self, message: str, exit_code: int, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[type, tuple[str, int, str | None]]:  # type: ignore[override]
        return type(self), (self.message, self.exit_code, self.hint)
