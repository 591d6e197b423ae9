"""step.c and matvec.c, built by this machine's compiler and kept in the cache folder.

Its sums have one order, however many texts are decoded together: a text is the same alone.
"""

import ctypes
import functools
import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from gptcli import atomic
from gptcli.errors import StorageError
from gptcli.settled import CLASSES, cached_file, isa_limit, processor

_SOURCES = [Path(__file__).with_name(name) for name in ("step.c", "matvec.c")]  # the first has all
SOURCE_MARK = hashlib.sha256(b"".join(file.read_bytes() for file in _SOURCES)).hexdigest()[:8]
_POINTER, _LONG = ctypes.c_void_p, ctypes.c_long
_ARGUMENTS: list[Any] = [ctypes.c_int, *[_POINTER] * 5, *[_LONG] * 3, ctypes.c_int]
_STEP_ARGUMENTS: list[Any] = [*[_POINTER] * 5, *[_LONG] * 4, ctypes.c_int]


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the library, built on first use; None where that is not possible."""
    compiler = shutil.which("cc")
    if sys.platform != "linux" or compiler is None:
        return None
    command = [compiler, "-O2", f"-march={CLASSES.get(isa_limit(), 'native')}", "-fPIC", "-shared"]
    path = cached_file("matvec", [SOURCE_MARK, *command, processor()], "so")
    try:
        if not path.exists():
            with tempfile.TemporaryDirectory() as folder:
                built = Path(folder) / "matvec.so"
                # Without -fopenmp, which would bring a second OpenMP and a second pool of threads:
                # the one symbol it needs is found in the OpenMP that torch has loaded.
                building = [*command, str(_SOURCES[0]), "-o", str(built)]
                subprocess.run(building, check=True, capture_output=True, timeout=120)
                atomic.make_folder(path.parent)
                atomic.write_bytes(path, built.read_bytes())
        found = ctypes.CDLL(str(path))
    except (OSError, StorageError, subprocess.SubprocessError):
        return None
    found.matvec.argtypes, found.matvec.restype = _ARGUMENTS, None
    found.decode_step.argtypes, found.decode_step.restype = _STEP_ARGUMENTS, None
    return found
