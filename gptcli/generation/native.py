"""matvec.c, built by this machine's compiler, and the cache folder that keeps what is settled."""

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from gptcli import atomic
from gptcli.device import machine_facts
from gptcli.errors import StorageError

_SOURCE = Path(__file__).with_name("matvec.c")
# Processors of the classes that torch and oneDNN can be limited to.
_CLASSES = {"AVX2": "haswell", "AVX512_CORE": "skylake-avx512", "AVX512_CORE_BF16": "cooperlake"}
_POINTER, _LONG = ctypes.c_void_p, ctypes.c_long
_ARGUMENTS = [ctypes.c_int, *[_POINTER] * 5, *[_LONG] * 3, ctypes.c_int]


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return matvec.c as a library, built on first use; None where that is not possible."""
    compiler = shutil.which("cc")
    if sys.platform != "linux" or compiler is None:
        return None
    command = [compiler, "-O2", f"-march={_CLASSES.get(_limit(), 'native')}", "-fPIC", "-shared"]
    path = _cached("matvec", [_SOURCE.read_text(), *command, _processor()], "so")
    try:
        if not path.exists():
            with tempfile.TemporaryDirectory() as folder:
                built = Path(folder) / "matvec.so"
                # Without -fopenmp, for that would bring a second OpenMP with threads of its own:
                # the one symbol it needs is found in the OpenMP that torch has loaded.
                subprocess.run([*command, _SOURCE, "-o", built], check=True, capture_output=True,
                               timeout=120)  # fmt: skip
                atomic.make_folder(path.parent)
                atomic.write_bytes(path, built.read_bytes())
        found = ctypes.CDLL(str(path))
    except (OSError, StorageError, subprocess.SubprocessError):
        return None
    found.matvec.argtypes, found.matvec.restype = _ARGUMENTS, None
    return found


def settled(question: str, answers: Collection[str], ask: Callable[[], str], again: bool) -> str:
    """Return the answer found for this processor, these threads and this torch, or ask for it.

    It is kept in the cache folder if that can be written; with `again` it is asked for anyway.
    """
    machine = {**machine_facts(torch.device("cpu")), "limit": _limit(), "processor": _processor()}
    path = _cached("kernel", [question, *answers, *map(str, machine.values())], "json")

    def known() -> str | None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            answer = str(json.loads(path.read_text())["answer"])
            return answer if answer in answers else None
        return None

    if not again and (answer := known()) is not None:
        return answer
    answer = ask()
    if not again and (meanwhile := known()) is not None:
        return meanwhile  # of another process, so that both write the same text
    with contextlib.suppress(StorageError):
        atomic.make_folder(path.parent)
        told = {"answer": answer, "question": question, **machine}
        atomic.write_bytes(path, json.dumps(told, indent=2).encode())
    return answer


def _cached(name: str, parts: list[str], suffix: str) -> Path:
    """Return the file of the cache folder for what these parts decide."""
    cache = os.environ.get("XDG_CACHE_HOME")
    folder = Path(cache) if cache else Path(os.path.expanduser("~/.cache"))  # noqa: PTH111
    mark = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return folder / "gptcli" / f"{name}-{mark}.{suffix}"


def _limit() -> str:
    """Return the class of processor that torch or oneDNN is limited to, or nothing."""
    limits = (os.environ.get(name, "") for name in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"))
    return next((limit.upper() for limit in limits if limit.upper() in _CLASSES), "")


@functools.cache
def _processor() -> str:
    """Return the processor's model and what it can do."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        kinds = ("model name", "flags", "CPU part", "Features")
        return "\n".join(sorted({line for line in lines if line.startswith(kinds)}))
    return platform.processor()
