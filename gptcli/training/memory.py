"""What a run needs of memory and disk, counted and estimated without taking any of it.

An estimate: what compilers, allocators and libraries add is not known beforehand. A network's
blocks are alike, so one is looked at, without weights: a million of them are counted as quickly.
"""

import contextlib
import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptcli.config.schema import Config
from gptcli.device import available_memory, machine_memory, memory_bytes
from gptcli.errors import MemoryLimitError, StorageError
from gptcli.formatting import size as bytes_text
from gptcli.model import GPT
from gptcli.training.optim import Optimizer
from gptcli.training.parallel import Parallelism
from gptcli.training.requirements import Disk, Memory
from gptcli.training.weights import freeze

_KERNELS = 30_000_000  # bytes of code and buffers that the first steps load on a CPU, as measured
_PROBED = (8, 16, 32)  # tokens of the rows that are tried
_LARGE_BLOCK = 5_000_000  # parameters from which a block is passed through without its weights
_TENSOR = 400  # bytes that a checkpoint takes to name a tensor, as measured
_PER_TENSOR = 4  # tensors in it of a parameter that learns: three are the optimizer's
_PER_ID = 16  # bytes of a token in it; only the tokenizer of GPT-2 is not in it
_FAR_TOO_MUCH = 1.5  # times what there is; estimates were within 1.4 of the truth
_TABLE = {"cpu": 1 << 26}  # bytes of the loss's table of logits at most, see model/loss.py
_TABLE_ELSEWHERE = 1 << 29
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Size:
    """What a network and its optimizer come to.

    Attributes:
        parameters: Of the network.
        learning: Those of them that are not frozen.
        block: Those of one block.
        saved: Those that every checkpoint holds: all, or the adapters.
        optimizer_bytes: State that the optimizer keeps.
        tensors: Those that every checkpoint holds.
    """

    parameters: int
    learning: int
    block: int
    saved: int
    optimizer_bytes: int
    tensors: int


def size_of(config: Config) -> Size:
    """Count what a settled configuration's network comes to.

    Raises:
        ConfigError: `train.freeze` names nothing, or all there is.
    """
    shape, times = config.model, 1
    if not config.train.freeze:  # which names single blocks; else they are alike
        shape, times = shape.model_copy(update={"n_layer": 1}), shape.n_layer
    with torch.device("meta"):
        model = GPT(shape)
    freeze(model, config.train.freeze)
    state = Optimizer(model, config.optim, torch.device(config.device)).bytes_by_name()
    parameters = learning = state_bytes = tensors = 0
    for name, parameter in model.named_parameters():
        many = times if name.startswith("h.") else 1
        parameters += many * parameter.numel()
        learning += many * parameter.numel() * parameter.requires_grad
        state_bytes += many * state.get(name, 0)
        if parameter.requires_grad or config.model.lora is None:
            tensors += many * (_PER_TENSOR if parameter.requires_grad else 1)
    block = sum(parameter.numel() for parameter in model.h[0].parameters())
    saved = parameters if config.model.lora is None else learning
    return Size(parameters, learning, block, saved, state_bytes, tensors)


def estimate_memory(
    config: Config, size: Size, rows: int, kind: Parallelism, n_processes: int
) -> Memory:
    """Estimate the memory of one process.

    Args:
        config: Settled.
        size: Of its network.
        rows: Of a micro-batch.
        kind: How the processes share the network.
        n_processes: That train it.
    """
    parts, gathered = 1, 0
    if kind == "fsdp":  # a block at a time is whole, and the next is on its way
        parts = n_processes
        outside = size.parameters - size.block * config.model.n_layer
        gathered = (2 * size.block + outside) * _DTYPES[config.dtype].itemsize
    device = torch.device(config.device)
    return Memory(
        weights=4 * size.parameters // parts + gathered,
        gradients=4 * size.learning // parts,
        optimizer=size.optimizer_bytes // parts,
        activations=_activations(config, rows) + _loss_bytes(config, rows),
        program=memory_bytes(device) + _KERNELS if device.type == "cpu" else 0,
        available=available_memory(device),
        processes=n_processes if device.type == "cpu" else 1,
    )


def require_memory(config: Config, memory: Memory) -> None:
    """Refuse a run that this machine cannot hold by far: on a CPU the system would kill it.

    Raises:
        MemoryLimitError: With what is needed and what there is.
    """
    there = machine_memory()
    needed = memory.total * memory.processes
    if config.device != "cpu" or there is None or needed <= _FAR_TOO_MUCH * there:
        return
    is_model = memory.model * memory.processes > there / 2
    raise MemoryLimitError(
        f"this needs about {bytes_text(needed)} of memory, {bytes_text(there)} are in this"
        f" machine: {bytes_text(memory.model)} for the model and its optimizer,"
        f" {bytes_text(memory.activations)} for a micro-batch",
        "use a smaller model" if is_model else "use a smaller train.micro_batch_size",
    )


def estimate_disk(config: Config, size: Size) -> Disk:
    """Return what the run's checkpoints need of the disk that its folder is, or will be, on."""
    n_ids = 0 if config.tokenizer.name == "gpt2" else config.model.vocab_size or 0
    rest = _TENSOR * size.tensors + _PER_ID * n_ids + (1 << 13)
    checkpoint = 4 * size.saved + size.optimizer_bytes + rest
    # What is kept, the best, the one that is being written while these are there, and the base.
    needed = (config.train.keep_last + 2) * checkpoint + 4 * (size.parameters - size.saved)
    checkpoints = config.run_folder / "checkpoints"
    held = 0
    if checkpoints.is_dir():
        held = sum(path.stat().st_size for path in checkpoints.iterdir() if path.is_file())
    place = checkpoints.absolute()
    there = next((folder for folder in (place, *place.parents) if folder.is_dir()), Path())
    return Disk(checkpoint, needed, held, shutil.disk_usage(there).free)


def require_disk(config: Config, size: Size) -> None:
    """Refuse a run whose checkpoints the disk cannot hold; one that has no folder yet is let by.

    Raises:
        StorageError: With what is needed and what is free.
    """
    checkpoints = config.run_folder / "checkpoints"
    if not checkpoints.is_dir():
        return
    disk = estimate_disk(config, size)
    if disk.needed - disk.held > disk.free:
        raise StorageError(
            f"{checkpoints}: checkpoints of {bytes_text(disk.checkpoint)} need"
            f" {bytes_text(disk.needed)} altogether, {bytes_text(disk.free)} are free",
            "free some space, set a smaller train.keep_last, or another disk with -s run_dir=...",
        )


def _activations(config: Config, rows: int) -> int:
    """Return what the blocks keep for the backward pass of a micro-batch, and what that takes.

    While a block goes backward, the gradients of what it kept take about as much again.
    Found by passing short rows through one block and through two: more blocks and rows are as
    many times that, and longer rows follow, for what is kept grows with their length, or with its
    square where no fused attention kernel takes dropout.
    """
    n_layer, length = config.model.n_layer, config.seq_len
    one, two = (_kept(config, blocks, length) for blocks in (1, 2))
    block = two[1] - one[1]
    if config.train.activation_checkpointing:
        entering = 4 * length * config.model.n_embd
        return int(rows * (one[1] + block + n_layer * entering) + one[0])
    casts = one[0] + (n_layer - 1) * (two[0] - one[0])
    return int(rows * (one[1] + n_layer * block) + casts)


def _kept(config: Config, blocks: int, length: int) -> tuple[float, float]:
    """Return the bytes kept whatever the number of rows, and those of a row of some length."""
    kept = [_kept_at(config, blocks, tokens) for tokens in _PROBED]
    (a, b, c), (x, y, z) = kept, _PROBED
    square = ((c - b) / (z - y) - (b - a) / (y - x)) / (z - x)
    slope = (b - a) / (y - x) - square * (x + y)
    fixed = a - slope * x - square * x * x
    return max(0.0, fixed), slope * length + square * length * length


def _kept_at(config: Config, blocks: int, tokens: int) -> int:
    """Return what a forward pass of one short row keeps, in bytes."""
    dropout = config.model.dropout if config.device == "cpu" else 0.0  # others have fused kernels
    update = {"n_layer": blocks, "block_size": tokens, "vocab_size": 64, "dropout": dropout}
    dtype = _DTYPES[config.dtype]
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with _without_weights(config), torch.random.fork_rng(devices=[]):
        model = GPT(config.model.model_copy(update=update))
        freeze(model, [])
        row = torch.zeros(1, tokens, dtype=torch.int64)
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32),
        ):
            out = model.hidden(row)
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        del out
        return sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items()
                   if place not in weights)  # fmt: skip


def _without_weights(config: Config) -> AbstractContextManager[Any]:
    """Return what keeps a large block from taking memory; it costs a second, small ones do not."""
    if 12 * config.model.n_embd**2 < _LARGE_BLOCK:
        return contextlib.nullcontext()
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def _loss_bytes(config: Config, rows: int) -> int:
    """Return what the loss takes beside the gradients that it leaves, see model/loss.py."""
    n_ids, dtype = config.model.vocab_size or 0, _DTYPES[config.dtype]
    tokens = rows * config.seq_len
    table = tokens * n_ids * dtype.itemsize
    table = min(table, _TABLE.get(config.device, _TABLE_ELSEWHERE))
    cast = n_ids * config.model.n_embd * dtype.itemsize if dtype != torch.float32 else 0
    return table + cast + 4 * tokens * config.model.n_embd
