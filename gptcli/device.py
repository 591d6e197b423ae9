"""What the machine decides: device, precision, memory; every such `auto` is resolved here."""

import contextlib
import ctypes
import math
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F

from gptcli.config.schema import Config
from gptcli.errors import ConfigError

_LAPS = 7  # of a timing, of which the fastest counts
_SHORT_SHARE = 0.2  # of the machine's memory: with less left, what is freed goes back at once
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


@dataclass(frozen=True)
class Runtime:
    """The machine's side of a run: device, precision of products, compiled or not."""

    device: torch.device
    dtype: torch.dtype
    compile: bool

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context for forward passes."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


def resolve_auto(config: Config) -> Config:
    """Return `config` with device, dtype and deterministic as concrete values.

    Whether compiling pays depends on the length of the run, see training/spec.py.

    Raises:
        ConfigError: The machine does not have the device that is asked for.
    """
    device = _device(config.device)
    update = {
        "device": device,
        "dtype": _dtype(device) if config.dtype == "auto" else config.dtype,
        "deterministic": False if config.deterministic == "auto" else config.deterministic,
    }
    return config.model_copy(update=update)


def init_runtime(config: Config, *, trains: bool = False) -> Runtime:
    """Prepare this process for `config` and return what it says about the machine.

    One that `trains` may round the factors of float32 products on CUDA to TF32's 11 bits, which is
    several times as fast; results that are reported in float32 are not rounded so.
    """
    resolved = resolve_auto(config)
    device, deterministic = torch.device(resolved.device), bool(resolved.deterministic)
    if deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(deterministic)  # imports torch's compiler
    if device.type == "cpu":
        from gptcli.waiting import watch  # which only a CPU needs

        watch()
        tune_malloc()
        if resolved.threads != "auto":
            torch.set_num_threads(resolved.threads)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if trains and not deterministic else "highest")
        # Deterministic mode would fill each buffer with NaN first; ours are all written.
        cast(Any, torch.utils.deterministic).fill_uninitialized_memory = False
    return Runtime(device, getattr(torch, resolved.dtype), resolved.compile is True)


@contextlib.contextmanager
def restored_threads() -> Iterator[None]:
    """Compute after the block with as many threads as before it."""
    n_threads = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != n_threads:
            torch.set_num_threads(n_threads)


def tune_malloc() -> None:
    """Let glibc keep what is freed, for the next step asks for the same again.

    By default blocks go back to the system at once, and each time they come back every page of
    them is cleared: a third of the time of a small model's step. Blocks of more than 64 MB still
    go back, for they would leave holes that nothing else fills.
    """
    _glibc("mallopt", _M_MMAP_THRESHOLD, 1 << 26)
    _glibc("mallopt", _M_TRIM_THRESHOLD, (1 << 31) - 1)


def memory_is_short() -> bool:
    """Return whether others may soon need memory that this process has freed and kept."""
    free, total = available_memory(torch.device("cpu")), machine_memory()
    return free is not None and total is not None and free < total * _SHORT_SHARE


def trim_malloc() -> None:
    """Give freed memory back after all, which costs a large model a tenth of its step."""
    _glibc("malloc_trim", 0)


def _glibc(name: str, *arguments: int) -> None:
    """Call a function of the C library, where it has one of this name."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*arguments)


def available_devices() -> list[str]:
    """Return the available kinds of device, best first."""
    devices = ["cuda"] if torch.cuda.is_available() and _has_kernels() else []
    devices += ["mps"] if torch.backends.mps.is_available() else []
    return [*devices, "cpu"]


def _has_kernels() -> bool:
    """Return whether this torch was built for the GPU: its wheels leave older ones out."""
    built = [arch.rstrip("af").split("_") for arch in torch.cuda.get_arch_list()
             if arch.startswith(("sm_", "compute_"))]  # fmt: skip
    major, minor = torch.cuda.get_device_capability()
    # A kernel (sm) runs on later GPUs of its generation, PTX code (compute) on all later ones.
    return not built or any(
        int(number) <= 10 * major + minor and (kind == "compute" or int(number) // 10 == major)
        for kind, number in built
    )


def _device(requested: str) -> str:
    available = available_devices()
    if requested == "auto":
        return available[0]
    if requested == "cuda" and requested not in available and torch.cuda.is_available():
        raise ConfigError(
            f"device: this torch has no kernels for {torch.cuda.get_device_name()}",
            "install a torch built for it (such as one for CUDA 12.6), or set -s device=cpu",
        )
    if requested not in available:
        raise ConfigError(
            f"device: this machine or this torch has no {requested}; it has {', '.join(available)}",
            "leave it out, or set -s device=auto",
        )
    return requested


def _dtype(device: str) -> str:
    """Return bfloat16 where the hardware multiplies it faster than float32."""
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device != "cpu" or not multiplies_bfloat16():
        return "float32"
    from gptcli.settled import settled

    # Whether it is also faster differs: without AMX from processor to processor, by a factor of 4.
    return settled("products for training", ("bfloat16", "float32"), _faster_dtype)


@torch.no_grad()
def _faster_dtype() -> str:
    """Time a product of the size that small models train with."""
    best = {"bfloat16": math.inf, "float32": math.inf}
    for _ in range(_LAPS):
        for name in best:
            x, W = (torch.ones(n, 384, dtype=getattr(torch, name)) for n in (512, 1536))
            F.linear(x, W)
            began = time.perf_counter()
            F.linear(x, W)
            best[name] = min(best[name], time.perf_counter() - began)
    return min(best, key=lambda name: best[name])


def multiplies_bfloat16() -> bool:
    """Return whether this CPU has instructions for products of bfloat16."""
    if platform.machine() in ("aarch64", "arm64"):
        return bool(getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)())
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def machine_facts(device: torch.device) -> dict[str, str | int]:
    """Return what the bits of a result depend on besides the configuration."""
    facts: dict[str, str | int] = {"torch": str(torch.__version__)}
    if device.type == "cuda":
        cudnn = cast(Any, torch.backends.cudnn).version()
        return {**facts, "device": torch.cuda.get_device_name(device), "cudnn": cudnn or 0}
    return {
        **facts,
        "device": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
    }


def available_memory(device: torch.device, for_others: bool = False) -> int | None:
    """Return the free bytes of the device or the machine; None if unknown.

    If only other processes are to use a GPU, all of it counts: asking what is free takes some.
    """
    if device.type == "cuda" and for_others:
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        # What torch's allocator holds and does not use is available too.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvail"))
    except (OSError, StopIteration, ValueError):
        total = machine_memory()
        return None if total is None else total // 2


def machine_memory() -> int | None:
    """Return the bytes of memory of the machine; None if unknown."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock reads the end of its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def memory_bytes(device: torch.device) -> int:
    """Return the most memory used so far: of the device, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if sys.platform == "win32":
        return 0  # the standard library has no such call there
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


# Peak operations a second of a device's dense tensor products, from the makers' data sheets, by a
# part of its name, the first that fits: bfloat16 and float16, float32 (by TF32 where there is TF32,
# for torch multiplies float32 in it).
_TERA = 1e12
_PEAKS: tuple[tuple[str, float, float | None], ...] = (
    ("GB300", 2500.0, 1250.0),
    ("B300", 2250.0, 1100.0),
    ("GB200", 2500.0, 1250.0),
    ("B200", 2250.0, 1100.0),
    ("H200", 989.5, 494.7),
    ("H100 PCIe", 756.0, 378.0),
    ("H100 NVL", 835.5, 417.5),
    ("H100", 989.5, 494.7),
    ("GH200", 989.5, 494.7),
    ("A100", 312.0, 156.0),
    ("A800", 312.0, 156.0),
    ("RTX PRO 6000", 503.8, 251.9),
    ("RTX 6000 Ada", 364.2, 182.1),
    ("RTX A6000", 154.8, 77.4),
    ("A40", 149.7, 74.8),
    ("A30", 165.0, 82.0),
    ("A10G", 70.0, 35.0),
    ("A10", 125.0, 62.5),
    ("L40S", 362.0, 183.0),
    ("L40", 181.0, 90.5),
    ("L4", 121.0, 60.0),
    ("V100", 125.0, 15.7),
    ("T4", 65.0, 8.1),
    ("RTX 5090", 209.5, 104.8),
    ("RTX 4090", 165.2, 82.6),
    ("RTX 4080", 97.5, 48.7),
    ("RTX 3090", 71.0, 35.6),
    ("RTX 3080", 59.5, 29.8),
)


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Return the operations a second that a device could do, None for one not in the table.

    Its name is the driver's, such as "NVIDIA A100-SXM4-80GB".
    """
    words = f" {device_name.replace('-', ' ')} "
    for part, half, single in _PEAKS:
        if f" {part} " in words:
            peak = single if dtype == "float32" else half
            return peak * _TERA if peak is not None else None
    return None
