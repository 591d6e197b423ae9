"""Checks of the machine: interpreter, torch, device, compiler, memory, limits.

torch is imported by the checks that need it: one that cannot be imported is a finding.
"""

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from gptcli.doctor.check import Check, fail, ok, warn
from gptcli.formatting import size

_PYTHON = (3, 11)
_TORCH = (2, 11)  # earlier ones have holes in weights_only
_LITTLE_MEMORY = 1 << 30
_LITTLE_SHARED_MEMORY = 1 << 28
_FEW_FILES = 256
_SHM = Path("/dev/shm")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_PROGRAM = """\
#include <Python.h>
#include <cmath>
{openmp}
extern "C" double work(double x) {{ return std::sqrt(x); }}
"""
_COMPILE_SECONDS = 60.0


def python() -> Check:
    """Check the interpreter's version."""
    found = f"{platform.python_version()} ({platform.python_implementation()}), {sys.platform}"
    if sys.version_info < _PYTHON:
        return fail(found, "install Python 3.11 or newer, and gptcli in it")
    if sys.maxsize < 2**32:
        return fail(f"{found}, 32 bits", "install a Python of 64 bits")
    return ok(found)


def torch() -> Check:
    """Check that torch can be imported and is new enough."""
    remedy = "install torch 2.11 or newer: https://pytorch.org/get-started/locally/"
    try:
        import torch
    except (ImportError, OSError) as error:
        return fail(f"cannot be imported: {str(error).splitlines()[0]}", remedy)
    version = str(torch.__version__)
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    return ok(version) if numbers >= _TORCH else fail(f"{version} is too old", remedy)


def device() -> Check:
    """Check what there is to compute on, by computing something on it."""
    import torch

    from gptcli.device import available_devices, machine_facts

    name = available_devices()[0]
    place = torch.device(name)
    ones = torch.ones(64, 64, device=place)
    if float((ones @ ones).sum()) != 64**3:
        return fail(f"{name} computes wrong numbers", "try -s device=cpu, or another torch")
    facts = machine_facts(place)
    found = f"{name}: {facts['device']}"
    if name == "cuda":
        count = torch.cuda.device_count()
        return ok(f"{found}{f' and {count - 1} more' if count > 1 else ''}")
    if (threads := facts.get("threads")) is not None:
        found += f", {threads} thread{'s' * (threads != 1)}"
    if name == "cpu" and shutil.which("nvidia-smi") is not None:
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no driver"
        return warn(
            f"{found}; an NVIDIA driver is installed, but torch finds no GPU ({why})",
            "install the CUDA build of torch: https://pytorch.org/get-started/locally/",
        )
    return ok(found)


def dtype() -> Check:
    """Say what `dtype: auto` gives here."""
    from gptcli.config import load_defaults
    from gptcli.device import resolve_auto

    settled = resolve_auto(load_defaults())
    text = f"auto trains in {settled.dtype}, evaluates in float32"
    if settled.dtype == "float32" and settled.device == "cpu":
        text += "; this processor has no bfloat16"
    return ok(text)


def compiler() -> Check:
    """Check that there is a compiler for torch.compile, by compiling something."""
    if sys.platform == "win32":
        name = shutil.which("cl")
        remedy = "compile: auto goes without; Visual Studio's C++ tools bring one"
        return ok(name) if name else warn("no cl: torch.compile cannot be used", remedy)
    names = (os.environ.get("CXX", ""), "g++", "clang++", "c++")
    program = next((found for name in names if name and (found := shutil.which(name))), None)
    remedy = "training works without, more slowly; install g++ (apt install g++, xcode-select)"
    if program is None:
        return warn("no C++ compiler: torch.compile cannot be used", remedy)
    problem = _compile(program)
    if problem is None:
        return ok(program)
    if "Python.h" in problem:
        remedy = "training works without, more slowly; install Python's headers (python3-dev)"
    return warn(f"{program} does not compile what torch.compile writes: {problem}", remedy)


def _compile(program: str) -> str | None:
    """Compile a small library; return the compiler's first complaint, None if it has none."""
    is_linux = sys.platform == "linux"
    source = _PROGRAM.format(openmp="#include <omp.h>" if is_linux else "")
    include = sysconfig.get_paths()["include"]
    options = ["-shared", "-fPIC", f"-I{include}", *(["-fopenmp"] if is_linux else [])]
    if sys.platform == "darwin":
        options += ["-undefined", "dynamic_lookup"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "check.cpp")
        file.write_text(source)
        command = [program, *options, str(file), "-o", str(file.with_suffix(".so"))]
        try:
            done = subprocess.run(
                command, capture_output=True, timeout=_COMPILE_SECONDS, check=False
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
    lines = done.stderr.decode(errors="replace").splitlines()
    complaint = next((line for line in lines if "error" in line), "".join(lines[:1]))
    return None if done.returncode == 0 else complaint.removeprefix(f"{file}:")


def memory() -> Check:
    """Say how much memory can still be had."""
    import torch

    from gptcli.device import available_devices, available_memory

    free = available_memory(torch.device("cpu"))
    limit = _cgroup_limit()
    parts = []
    if free is not None:
        known = min(free, limit) if limit is not None else free
        within = f" ({size(limit)} at most here)" if limit is not None else ""
        parts.append(f"{size(known)} free{within}")
    if "cuda" in available_devices():
        for index in range(torch.cuda.device_count()):
            room, total = torch.cuda.mem_get_info(index)
            parts.append(f"cuda:{index} {size(room)} of {size(total)} free")
    found = ", ".join(parts) or "unknown"
    if free is not None and min(free, limit or free) < _LITTLE_MEMORY:
        return warn(found, "close other programs, or train a small network: -c quickstart")
    return ok(found)


def _cgroup_limit() -> int | None:
    """Return the most memory that a container gives, None if there is no such limit."""
    try:
        return int(_CGROUP_LIMIT.read_text())
    except (OSError, ValueError):  # none, or the word "max"
        return None


def shared_memory() -> Check:
    """Check /dev/shm, through which the processes of several devices talk."""
    if not _SHM.is_dir():
        return ok("no /dev/shm on this system; nothing needs it here")
    free = shutil.disk_usage(_SHM).free
    found = f"{size(free)} free in /dev/shm"
    if free < _LITTLE_SHARED_MEMORY:
        return warn(found, "only several GPUs need more: docker run --shm-size=1g")
    return ok(found)


def open_files() -> Check:
    """Check how many files a process may have open."""
    if sys.platform == "win32":
        return ok("no limit to set on this system")
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    is_unlimited = soft == resource.RLIM_INFINITY
    found = f"{'any number' if is_unlimited else soft} at once"
    if not is_unlimited and soft < _FEW_FILES:
        return warn(found, "large data sets may need more: ulimit -n 4096")
    return ok(found)
