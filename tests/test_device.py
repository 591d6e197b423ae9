"""What the machine decides, and what devices say when they cannot: no card is needed for it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gptcli import device
from gptcli.config import Config
from gptcli.device import available_devices, available_memory, resolve_auto
from gptcli.errors import ConfigError, is_out_of_memory
from support.commands import Gpt

OUT_OF_MEMORY = [
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB",
    "CUDA error: out of memory",
    "MPS backend out of memory (MPS allocated: 5.20 GB, other allocations: 2.41 GB, max 9.07 GB)",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "NCCL error in: ProcessGroupNCCL.cpp: Cuda failure 2 'out of memory'",
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 412316860416 bytes",
]


@pytest.mark.parametrize("text", OUT_OF_MEMORY)
def test_every_device_s_words_for_too_little_memory_are_understood(text: str) -> None:
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError("CUDA error: device-side assert triggered"))


@pytest.mark.parametrize("text", [OUT_OF_MEMORY[0], OUT_OF_MEMORY[3]])
@pytest.mark.parametrize("command", ["eval", "generate"])
def test_a_device_without_memory_is_exit_8_with_a_hint(
    text: str, command: str, gpt: Gpt, monkeypatch: pytest.MonkeyPatch, run: object
) -> None:
    def fail(*arguments: object, **keywords: object) -> None:
        raise torch.OutOfMemoryError(text) if text.startswith("CUDA out") else RuntimeError(text)

    monkeypatch.setattr(torch.nn.functional, "embedding", fail)
    done = gpt(command, "--checkpoint", "tiny", "--json")
    assert done.code == 8 and "out of memory" in done.json["error"] and done.json["hint"]


@pytest.fixture
def old_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card of an architecture that this torch was not built for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90a", "compute_120"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (6, 1))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "Tesla P100")


@pytest.mark.usefixtures("old_card")
def test_a_card_that_torch_has_no_kernels_for_is_not_chosen() -> None:
    assert "cuda" not in available_devices()
    assert resolve_auto(Config()).device != "cuda"


@pytest.mark.usefixtures("old_card")
def test_a_card_that_torch_has_no_kernels_for_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="no kernels for Tesla P100") as error:
        resolve_auto(Config(device="cuda"))
    assert error.value.exit_code == 2 and error.value.hint


WHEEL = ["sm_80", "sm_90a", "sm_100f", "compute_120"]


@pytest.mark.parametrize(
    ("capability", "built", "is_found"),
    [
        ((8, 9), WHEEL, True),  # a kernel for 8.0 runs on it
        ((7, 5), WHEEL, False),
        ((12, 1), WHEEL, True),  # compiled on the spot
        ((11, 0), WHEEL, False),  # of no generation that is built
        ((10, 0), ["sm_80", "sm_90"], False),
        ((9, 0), ["gfx90a"], True),  # ROCm's names are of another kind
    ],
)
def test_a_gpu_without_kernels_is_not_taken(
    capability: tuple[int, int],
    built: list[str],
    is_found: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert ("cuda" in available_devices()) == is_found


def test_planning_for_other_processes_takes_no_memory_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    properties = SimpleNamespace(total_memory=1 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert available_memory(torch.device("cuda"), for_others=True) == 1 << 30


def test_the_precision_of_training_is_timed_once_for_a_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = resolve_auto(Config(device="cpu")).dtype
    if not device.multiplies_bfloat16():
        assert first == "float32" and not list(tmp_path.iterdir())
        return
    (file,) = (tmp_path / "gptcli").iterdir()
    assert f'"answer": "{first}"' in file.read_text()
    other = {"float32": "bfloat16", "bfloat16": "float32"}[first]
    file.write_text(file.read_text().replace(f'"answer": "{first}"', f'"answer": "{other}"'))
    assert resolve_auto(Config(device="cpu")).dtype == other, "it is read, not timed again"


def test_freed_memory_goes_back_only_where_little_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "machine_memory", lambda: 100)
    for free, is_short in ((10, True), (50, False)):
        monkeypatch.setattr(device, "available_memory", lambda of, free=free: free)
        assert device.memory_is_short() is is_short
