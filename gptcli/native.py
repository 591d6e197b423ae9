"""C files of ours, built by this machine's compiler on first use and kept in the cache folder."""

import ctypes
import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from gptcli import atomic
from gptcli.errors import StorageError
from gptcli.settled import CLASSES, cached_file, isa_limit, processor

_VECTORS = Path(__file__).with_name("vectors.h")  # which all of them include


def build(source: Path, *included: Path, options: tuple[str, ...] = ()) -> ctypes.CDLL | None:
    """Load the library of a C file and those it includes; None where that is not possible."""
    compiler = shutil.which("cc")
    if sys.platform != "linux" or compiler is None:
        return None
    command = [compiler, "-O2", f"-march={CLASSES.get(isa_limit(), 'native')}", "-fPIC", "-shared",
               *options]  # fmt: skip
    text = b"".join(file.read_bytes() for file in (source, *included, _VECTORS))
    parts = [hashlib.sha256(text).hexdigest(), *command, processor()]
    path = cached_file(source.stem, parts, "so")
    try:
        if not path.exists():
            with tempfile.TemporaryDirectory() as folder:
                built = Path(folder) / path.name
                # Without -fopenmp, which would bring a second OpenMP and a second pool of threads:
                # the symbols it needs are found in the OpenMP that torch has loaded.
                building = [*command, str(source), "-o", str(built)]
                subprocess.run(building, check=True, capture_output=True, timeout=120)
                try:
                    atomic.make_folder(path.parent)
                    atomic.write_bytes(path, built.read_bytes())
                except StorageError:  # for this process alone, in which it stays when it is removed
                    return ctypes.CDLL(str(built))
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None
