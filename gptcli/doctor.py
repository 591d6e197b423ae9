"""`gpt doctor`: whether this machine has what the program needs, and how to fix what is missing.

torch is imported by the checks that need it: a torch that cannot be imported is a finding.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Literal

from gptcli.errors import ConfigError, GptError, StorageError
from gptcli.formatting import plural, size

_TORCH = (2, 11)  # earlier versions have holes in weights_only
_LOW_MEMORY, _LOW_SHARED_MEMORY, _LOW_DISK = 1 << 30, 1 << 28, 1 << 30  # bytes
_FEW_FILES = 256
_WRITTEN = 32 << 20  # enough to see a slow disk, little enough to wait for
_SLOW_DISK = 20e6  # bytes per second
_COMPILE_SECONDS, _NETWORK_SECONDS = 60.0, 4.0
_SHM, _CGROUP_LIMIT = Path("/dev/shm"), Path("/sys/fs/cgroup/memory.max")
_PROGRAM = """\
#include <Python.h>
#include <cmath>
{openmp}
extern "C" double work(double x) {{ return std::sqrt(x); }}
"""
_INSTALL_AGAIN = "install gptcli again: pip install --force-reinstall gptcli"
_REQUIREMENT = re.compile(r"([\w.-]+).*extra\s*==\s*['\"](?!dev\b)([\w-]+)['\"]")


@dataclass(frozen=True)
class Check:
    """What a check found, and how to fix what is missing; a note is about what not all need."""

    status: Literal["ok", "note", "error"]
    found: str
    remedy: str | None = None
    exit_code: int = 0


def run_checks() -> Iterator[tuple[str, Check]]:
    """Run one check after another; yield its name and finding as they come."""
    for name, check in _CHECKS.items():
        try:
            yield name, check()
        except Exception as error:  # what breaks a check is what it was to find
            is_ours, message = isinstance(error, GptError), str(error)
            text = message.split("\n")[0] if is_ours else f"{type(error).__name__}: {message}"
            yield name, _fail(text, _INSTALL_AGAIN)


_ok, _warn = partial(Check, "ok"), partial(Check, "note")
_fail = partial(Check, "error", exit_code=ConfigError.exit_code)


def _python() -> Check:
    return _ok(f"{platform.python_version()} ({platform.python_implementation()}), {sys.platform}")


def _torch() -> Check:
    remedy = "install torch 2.11 or newer: https://pytorch.org/get-started/locally/"
    try:
        import torch
    except (ImportError, OSError) as error:
        return _fail(f"cannot be imported: {str(error).splitlines()[0]}", remedy)
    version = str(torch.__version__)
    numbers = tuple(map(int, version.split("+")[0].split(".")[:2]))
    return _ok(version) if numbers >= _TORCH else _fail(f"{version} is too old", remedy)


def _device() -> Check:
    import torch

    from gptcli.device import available_devices, machine_facts

    name = available_devices()[0]
    device = torch.device(name)
    ones = torch.ones(64, 64, device=device)
    if float((ones @ ones).sum()) != 64**3:
        return _fail(f"{name} computes wrong numbers", "try -s device=cpu, or another torch")
    facts = machine_facts(device)
    found = f"{name}: {facts['device']}"
    if name == "cuda":
        count = torch.cuda.device_count()
        return _ok(found + f" and {count - 1} more" * (count > 1))
    if isinstance(threads := facts.get("threads"), int):
        found += f", {plural(threads, 'thread')}"
    if name == "cpu" and shutil.which("nvidia-smi") is not None:
        why = "this torch is built without CUDA" if torch.version.cuda is None else "no driver"
        return _warn(
            f"{found}; an NVIDIA driver is installed, but torch finds no GPU ({why})",
            "install the CUDA build of torch: https://pytorch.org/get-started/locally/",
        )
    return _ok(found)


def _dtype() -> Check:
    from gptcli.config import Config
    from gptcli.device import resolve_auto

    config = resolve_auto(Config())
    lacks = "; on this processor bfloat16 is no faster"
    is_slow = config.dtype == "float32" and config.device == "cpu"
    return _ok(f"auto trains in {config.dtype}, evaluates in float32" + lacks * is_slow)


def _compiler() -> Check:
    """Check that there is a compiler for torch.compile, by compiling something."""
    if sys.platform == "win32":
        remedy = "compile: auto goes without; install Visual Studio's C++ tools"
        name = shutil.which("cl")
        return _ok(name) if name else _warn("no cl: torch.compile cannot be used", remedy)
    names = (os.environ.get("CXX", ""), "g++", "clang++", "c++")
    program = next((found for name in names if name and (found := shutil.which(name))), None)
    remedy = "training works without, more slowly; install g++ (apt install g++, xcode-select)"
    if program is None:
        return _warn("no C++ compiler: torch.compile cannot be used", remedy)
    complaint = _compile(program)
    if complaint is None:
        return _ok(program)
    if "Python.h" in complaint:
        remedy = "training works without, more slowly; install Python's headers (python3-dev)"
    return _warn(f"{program} does not compile what torch.compile writes: {complaint}", remedy)


def _compile(program: str) -> str | None:
    """Compile a small library; return the compiler's first complaint, None if it has none."""
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    options = ["-shared", "-fPIC", f"-I{sysconfig.get_paths()['include']}", *openmp]
    if sys.platform == "darwin":
        options += ["-undefined", "dynamic_lookup"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "check.cpp")
        file.write_text(_PROGRAM.format(openmp="#include <omp.h>" if openmp else ""))
        command = [program, *options, str(file), "-o", str(file.with_suffix(".so"))]
        try:
            done = subprocess.run(command, capture_output=True, timeout=_COMPILE_SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
    if done.returncode == 0:
        return None
    lines = done.stderr.decode(errors="replace").splitlines()
    complaint = next((line for line in lines if "error" in line), "".join(lines[:1]))
    return complaint.removeprefix(f"{file}:")


def _memory() -> Check:
    import torch

    from gptcli.device import available_devices, available_memory

    free, note, parts = available_memory(torch.device("cpu")), "", []
    if free is not None:
        with suppress(OSError, ValueError):  # no container, or one without a limit
            limit = int(_CGROUP_LIMIT.read_text())
            free, note = min(free, limit), f" ({size(limit)} at most here)"
        parts.append(f"{size(free)} free{note}")
    if "cuda" in available_devices():
        for index in range(torch.cuda.device_count()):
            free_here, total = torch.cuda.mem_get_info(index)
            parts.append(f"cuda:{index} {size(free_here)} of {size(total)} free")
    found = ", ".join(parts) or "unknown"
    remedy = "close other programs, or train a small model: -c quickstart"
    return _warn(found, remedy) if free is not None and free < _LOW_MEMORY else _ok(found)


def _shared_memory() -> Check:
    """Check /dev/shm, through which the processes of several devices talk."""
    if not _SHM.is_dir():
        return _ok("no /dev/shm on this system; nothing needs it here")
    free = shutil.disk_usage(_SHM).free
    found, remedy = f"{size(free)} free in /dev/shm", "docker run --shm-size=1g"
    is_low = free < _LOW_SHARED_MEMORY
    return _warn(found, f"only several GPUs need more: {remedy}") if is_low else _ok(found)


def _open_files() -> Check:
    if sys.platform == "win32":
        return _ok("no limit to set on this system")
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return _ok("any number at once")
    remedy = "large datasets may need more: ulimit -n 4096"
    return _warn(f"{limit} at once", remedy) if limit < _FEW_FILES else _ok(f"{limit} at once")


def _disk() -> Check:
    here = Path.cwd()
    free, block = shutil.disk_usage(here).free, os.urandom(1 << 20)  # some disks compress
    try:
        with tempfile.NamedTemporaryFile(dir=here, prefix=".gpt-doctor-") as file:
            began = time.perf_counter()
            for _ in range(_WRITTEN // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            rate = _WRITTEN / max(time.perf_counter() - began, 1e-9)
    except OSError as error:
        return _fail(
            f"{here} cannot be written: {error.strerror}",
            "change to a folder of yours on a disk with free space, and work there",
            exit_code=StorageError.exit_code,
        )
    found = f"{size(free)} free here, {size(rate)}/s written"
    if free < _LOW_DISK:
        return _warn(found, "a checkpoint of 124M parameters takes 1.5 GB; free some space")
    if rate < _SLOW_DISK:
        return _warn(found, "saving will be slow; a local disk is faster than a network disk")
    return _ok(found)


def _caches() -> Check:
    """Check that downloads can be kept."""
    from huggingface_hub import constants

    cache = os.environ.get("XDG_CACHE_HOME")
    folders = [Path(constants.HF_HUB_CACHE), Path(cache) if cache else Path.home() / ".cache"]
    for folder in folders:
        try:
            existing = next(path for path in (folder, *folder.parents) if path.exists())
            with tempfile.NamedTemporaryFile(dir=existing, prefix=".gpt-doctor-"):
                pass
        except OSError as error:
            return _warn(
                f"{folder} cannot be written: {error.strerror}",
                "downloads need it: set HF_HOME (or XDG_CACHE_HOME) to a folder of yours",
            )
    return _ok(f"{folders[0]}, {size(shutil.disk_usage(existing).free)} free")


def _tokenizer() -> Check:
    from gptcli.tokenizers.bpe import gpt2

    tokenizer, text = gpt2(), "Hello, wörld"
    if tokenizer.decode(tokenizer.encode(text).tolist()) != text:
        return _fail("gpt2 does not give back what it encoded", _INSTALL_AGAIN)
    return _ok(f"gpt2 in the package, {tokenizer.vocab_size:,} ids, its hash is right")


def _examples() -> Check:
    from gptcli.config.loader import example_files, load_config

    files = example_files()
    for file in files:
        load_config(str(file))
    names = ", ".join(file.stem for file in files)
    return _ok(names) if files else _fail("no examples in the package", _INSTALL_AGAIN)


def _network() -> Check:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return _ok("offline by HF_HUB_OFFLINE: the Hub's cache is used, nothing is downloaded")
    address = constants.ENDPOINT
    problems: list[str] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(address, method="HEAD")
            urllib.request.urlopen(request, timeout=_NETWORK_SECONDS).close()
        except urllib.error.HTTPError:  # which is an answer
            pass
        except (OSError, ValueError) as error:
            problems.append(str(getattr(error, "reason", error)))

    # In a thread: looking up a name has no timeout.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_NETWORK_SECONDS)
    if problems or thread.is_alive():
        problem = problems[0] if problems else f"nothing within {_NETWORK_SECONDS:.0f} s"
        return _warn(
            f"no answer from {address} ({problem})",
            "only downloads need it; HF_ENDPOINT names a mirror, https_proxy a proxy",
        )
    return _ok(f"{address} answers" + ", HF_TOKEN is set" * bool(os.environ.get("HF_TOKEN")))


def _extras() -> Check:
    """Say which optional parts are installed."""
    packages: dict[str, list[str]] = {}
    try:
        requirements = metadata.requires("gptcli") or []
    except metadata.PackageNotFoundError:
        return _warn("running from a source tree", "pip install it")
    for match in filter(None, map(_REQUIREMENT.match, requirements)):
        packages.setdefault(match[2], []).append(match[1])
    installed = {name for names in packages.values() for name in names
                 if next(iter(metadata.distributions(name=name)), None)}  # fmt: skip
    here = [extra for extra, names in packages.items() if installed.issuperset(names)]
    missing = [extra for extra in packages if extra not in here]
    found = ", ".join(here) or "none"
    if missing:
        found += f"; not installed: {', '.join(missing)} (pip install 'gptcli[{missing[0]}]')"
    return _ok(found)


_CHECKS: dict[str, Callable[[], Check]] = {
    "python": _python, "torch": _torch, "device": _device, "dtype": _dtype,
    "compiler": _compiler, "memory": _memory, "shm": _shared_memory, "open files": _open_files,
    "disk": _disk, "caches": _caches, "tokenizer": _tokenizer, "examples": _examples,
    "network": _network, "extras": _extras,
}  # fmt: skip
