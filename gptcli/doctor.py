"""`gpt doctor`: whether this machine has what the program needs, and how to fix what is missing.

torch is imported by the checks that need it: a torch that cannot be imported is a finding.
"""

import os
import platform
import shutil
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
from pathlib import Path
from typing import Literal

from gptcli.errors import ConfigError, GptError, StorageError
from gptcli.formatting import plural, size

_LOW_MEMORY, _LOW_DISK = 1 << 30, 1 << 30  # bytes
_WRITTEN = 32 << 20  # enough to see a slow disk, little enough to wait for
_SLOW_DISK = 20e6  # bytes per second
_NETWORK_SECONDS = 4.0
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_INSTALL_AGAIN = "install gptcli again: pip install --force-reinstall gptcli"


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
    import torch

    return _ok(str(torch.__version__))


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
    names = ("cl",) if sys.platform == "win32" else (os.environ.get("CXX", ""), "g++", "clang++")
    program = next((found for name in names if name and (found := shutil.which(name))), None)
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    remedy = "training works without, more slowly; install g++ and Python's headers (python3-dev)"
    if program is None:
        return _warn("no C++ compiler: torch.compile cannot be used", remedy)
    if not headers.is_file():
        return _warn(f"{program}, but no {headers}: torch.compile cannot be used", remedy)
    return _ok(program)


def _memory() -> Check:
    import torch

    from gptcli.device import available_memory

    free = available_memory(torch.device("cpu"))
    if free is None:
        return _ok("unknown")
    with suppress(OSError, ValueError):  # no container, or one without a limit
        free = min(free, int(_CGROUP_LIMIT.read_text()))
    remedy = "close other programs, or train a small model: -c quickstart"
    return _warn(f"{size(free)} free", remedy) if free < _LOW_MEMORY else _ok(f"{size(free)} free")


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


def _tokenizer() -> Check:
    from gptcli.tokenizers.bpe import gpt2

    tokenizer, text = gpt2(), "Hello, wörld"
    if tokenizer.decode(tokenizer.encode(text).tolist()) != text:
        return _fail("gpt2 does not give back what it encoded", _INSTALL_AGAIN)
    return _ok(f"gpt2 in the package, {tokenizer.vocab_size:,} ids, its hash is right")


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


_CHECKS: dict[str, Callable[[], Check]] = {
    "python": _python, "torch": _torch, "device": _device, "dtype": _dtype,
    "compiler": _compiler, "memory": _memory, "disk": _disk, "tokenizer": _tokenizer,
    "network": _network,
}  # fmt: skip
