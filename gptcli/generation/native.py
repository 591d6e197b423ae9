"""step.c and matvec.c, one library.

Its sums have one order, however many texts are decoded together: a text is the same alone.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any

from gptcli.native import build

_SOURCES = [Path(__file__).with_name(name) for name in ("step.c", "matvec.c")]  # the first has all
_POINTER, _LONG = ctypes.c_void_p, ctypes.c_long
_ARGUMENTS: list[Any] = [ctypes.c_int, *[_POINTER] * 5, *[_LONG] * 3, ctypes.c_int]
_STEP_ARGUMENTS: list[Any] = [*[_POINTER] * 5, *[_LONG] * 3, ctypes.c_int, _LONG, ctypes.c_int]


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the library; None where it cannot be built."""
    found = build(*_SOURCES)
    if found is not None:
        found.matvec.argtypes, found.matvec.restype = _ARGUMENTS, None
        found.decode_step.argtypes, found.decode_step.restype = _STEP_ARGUMENTS, None
    return found
