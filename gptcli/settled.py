"""What is measured once on a machine and kept in its cache folder: answers that hold from then on.

So the same seed gives the same text, and nothing is timed at every start.
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
from collections.abc import Callable, Collection
from pathlib import Path

import torch

from gptcli import atomic
from gptcli.errors import StorageError

# Classes of processors that torch and oneDNN can be limited to, with the compiler's name of one.
CLASSES = {"AVX2": "haswell", "AVX512_CORE": "skylake-avx512", "AVX512_CORE_BF16": "cooperlake"}


def settled(question: str, answers: Collection[str], ask: Callable[[], str]) -> str:
    """Return the answer found for this processor, these threads and this torch, or ask for it.

    It is kept in the cache folder if that can be written.
    """
    machine = {
        "torch": str(torch.__version__), "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(), "limit": isa_limit(), "processor": processor(),
    }  # fmt: skip
    path = cached_file("settled", [question, *answers, *map(str, machine.values())], "json")

    def known() -> str | None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            answer = str(json.loads(path.read_text())["answer"])
            return answer if answer in answers else None
        return None

    if (answer := known()) is not None:
        return answer
    answer = ask()
    if (meanwhile := known()) is not None:
        return meanwhile  # of another process, so that both write the same text
    with contextlib.suppress(StorageError):
        atomic.make_folder(path.parent)
        told = {"answer": answer, "question": question, **machine}
        atomic.write_bytes(path, json.dumps(told, indent=2).encode())
    return answer


def cached_file(name: str, parts: list[str], suffix: str) -> Path:
    """Return the file of the cache folder for what these parts decide."""
    cache = os.environ.get("XDG_CACHE_HOME")
    folder = Path(cache) if cache else Path(os.path.expanduser("~/.cache"))  # noqa: PTH111
    mark = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    return folder / "gptcli" / f"{name}-{mark}.{suffix}"


def isa_limit() -> str:
    """Return the class of processor that torch or oneDNN is limited to, or nothing."""
    limits = (os.environ.get(name, "") for name in ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY"))
    return next((limit.upper() for limit in limits if limit.upper() in CLASSES), "")


@functools.cache
def processor() -> str:
    """Return the processor's model and what it can do."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        kinds = ("vendor_id", "model name", "flags", "CPU part", "Features")
        return "\n".join(sorted({line for line in lines if line.startswith(kinds)}))
    return platform.processor()
