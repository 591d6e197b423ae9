"""What a run needs of memory and disk, estimated without allocating its model.

The blocks of a model are alike, so one is measured and multiplied: a thousand are estimated as
quickly. What compilers, allocators and libraries add is not known beforehand.
"""

import contextlib
import functools
import shutil
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from gptcli import atomic
from gptcli.config.model import ModelConfig
from gptcli.config.schema import Config
from gptcli.device import available_memory, machine_memory, memory_bytes
from gptcli.distributed.environment import place
from gptcli.errors import ConfigError, MemoryLimitError, StorageError
from gptcli.formatting import size as bytes_text
from gptcli.model import GPT
from gptcli.model.kernels import torch_only
from gptcli.model.loss import buffer_bytes
from gptcli.model.products import can_multiply
from gptcli.training.optim import Optimizer
from gptcli.training.weights import freeze

Parallelism = Literal["none", "ddp", "fsdp"]
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_KERNELS = 30_000_000  # bytes of code and buffers that the first steps load on a CPU, as measured
_SHARE = 0.6  # of the memory there is that `auto` fills: estimates were within 1.4 of the truth
_FAR_TOO_MUCH = 1.5  # times the machine's memory, from where on a run is refused
# Tokens of a micro-batch from where on more is not faster.
_ENOUGH_TOKENS = {"cpu": 8192, "cuda": 65536, "mps": 16384}
_LARGE_PROBE = 600_000_000  # products in a block's pass, from where on it is not computed
_TENSOR = 400  # bytes that a checkpoint takes to name a tensor, as measured
_PER_TENSOR = 4  # tensors in it of a parameter that learns: three are the optimizer's
_PER_ID = 16  # bytes of a token in it; only the tokenizer of GPT-2 is not in it


@dataclass(frozen=True)
class ModelSize:
    """Counts of a model and its optimizer."""

    parameters: int  # all parameters
    trained: int  # those that are not frozen
    block: int  # those of one block
    saved: int  # those in every checkpoint: all, or the adapters
    optimizer_bytes: int  # state that the optimizer keeps
    tensors: int  # tensors in every checkpoint


@dataclass(frozen=True)
class Memory:
    """An estimate of the memory that one process needs, in bytes."""

    weights: int
    gradients: int
    optimizer: int
    activations: int  # saved by a forward pass for the backward pass, the loss included
    program: int  # already used by Python and torch; 0 where the device has its own memory
    available: int | None  # what all processes of this machine can have together; None if unknown
    processes: int = 1  # processes that share it

    @property
    def model(self) -> int:
        """What the model and its optimizer need, whatever the batch."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """All of it, for one process."""
        return self.model + self.activations + self.program

    def fits_in(self, share: float) -> bool:
        """Tell whether what is not yet used fits in a share of what is free; yes if unknown."""
        if self.available is None:
            return True
        return self.total * self.processes - self.program <= share * (self.available - self.program)

    @property
    def fits(self) -> bool:
        """Whether there is enough; unknown counts as yes."""
        return self.fits_in(1.0)


@dataclass(frozen=True)
class Disk:
    """What checkpoints need, in bytes."""

    checkpoint: int  # one checkpoint
    needed: int  # all that are on the disk at once
    held: int  # those that are there already
    free: int  # free on the disk of the run folder

    @property
    def fits(self) -> bool:
        """Whether there is enough."""
        return self.needed - self.held <= self.free


def model_size(config: Config) -> ModelSize:
    """Count the parameters of a settled configuration's model and the optimizer's state.

    Raises:
        ConfigError: `train.freeze` names nothing, or all there is.
    """
    shape, times = config.model, 1
    if not config.train.freeze:  # which names single blocks; otherwise they are alike
        shape, times = shape.model_copy(update={"n_layer": 1}), shape.n_layer
    with torch.device("meta"):
        model = GPT(shape)
    freeze(model, config.train.freeze)
    state = Optimizer(model, config.optim, torch.device(config.device)).bytes_by_name()
    parameters = trained = state_bytes = tensors = 0
    for name, parameter in model.named_parameters():
        many = times if name.startswith("h.") else 1
        parameters += many * parameter.numel()
        trained += many * parameter.numel() * parameter.requires_grad
        state_bytes += many * state.get(name, 0)
        if config.train.ema and parameter.requires_grad:  # the average is kept beside the weights
            state_bytes += many * 4 * parameter.numel()
            tensors += many
        if parameter.requires_grad or config.model.lora is None:
            tensors += many * (_PER_TENSOR if parameter.requires_grad else 1)
    block = sum(parameter.numel() for parameter in model.h[0].parameters())
    saved = parameters if config.model.lora is None else trained
    return ModelSize(parameters, trained, block, saved, state_bytes, tensors)


def estimate_memory(
    config: Config,
    size: ModelSize,
    rows: int,
    parallel: Parallelism,
    n_processes: int,
    allocated: int = 0,
) -> Memory:
    """Estimate the memory of one process; `allocated` bytes of it this one has already."""
    parts, gathered = 1, 0
    if parallel == "fsdp":  # one block at a time is full, and the next is on its way
        parts = n_processes
        outside = size.parameters - size.block * config.model.n_layer
        gathered = (2 * size.block + outside) * _DTYPES[config.dtype].itemsize
    device = torch.device(config.device)
    is_cpu = device.type == "cpu"
    program = memory_bytes(device) + _KERNELS if is_cpu else 0
    available = available_memory(device, n_processes > 1 and place().size == 1)
    if available is not None:  # what this process has already is not available, but is its own
        available += program or allocated
    return Memory(
        weights=4 * size.parameters // parts + gathered,
        gradients=4 * size.trained * (2 if parallel == "ddp" else 1) // parts,  # and its buckets
        optimizer=size.optimizer_bytes // parts,
        activations=_activations(config, rows) + _loss_bytes(config, rows),
        program=max(0, program - allocated),
        available=available,
        processes=n_processes if is_cpu else 1,
    )


def choose_parallelism(config: Config, size: ModelSize, n_processes: int) -> Parallelism:
    """Say how the processes share a model: each has a copy while that fits, else a shard.

    Raises:
        ConfigError: The configuration requests what shards cannot do.
    """
    if n_processes == 1:
        return "none"
    parallel = config.train.parallel
    if parallel == "auto":
        fits = estimate_memory(config, size, 1, "ddp", n_processes).fits_in(_SHARE)
        parallel = "ddp" if fits else "fsdp"
    if parallel == "fsdp" and config.dtype == "float16":
        raise ConfigError(
            "dtype: float16 scales its loss, which fsdp does not support", "set dtype=bfloat16"
        )
    return parallel


def fitting_rows(config: Config, size: ModelSize, parallel: Parallelism, n_processes: int) -> int:
    """Return the most rows of a micro-batch that fit in memory and divide a process's share.

    Raises:
        MemoryLimitError: Not even one row fits.
    """
    n_rows = config.tokens_per_step // config.seq_len // n_processes
    most = max(1, _ENOUGH_TOKENS[config.device] // config.seq_len)

    def memory(rows: int) -> Memory:
        return estimate_memory(config, size, rows, parallel, n_processes)

    for rows in range(min(n_rows, most), 1, -1):
        if n_rows % rows == 0 and memory(rows).fits_in(_SHARE):
            return rows
    if memory(1).fits:
        return 1
    raise MemoryLimitError(
        f"not even one row of {config.seq_len} tokens fits in memory",
        "use a smaller model, a shorter data.seq_len, or dtype=bfloat16",
    )


def require_memory(config: Config, memory: Memory) -> None:
    """Refuse a run that far exceeds this machine: on a CPU the system would kill it.

    Raises:
        MemoryLimitError: With what is needed and what there is.
    """
    installed = machine_memory()
    needed = memory.total * memory.processes
    if config.device != "cpu" or installed is None or needed <= _FAR_TOO_MUCH * installed:
        return
    is_model = memory.model * memory.processes > installed / 2
    raise MemoryLimitError(
        f"this run needs about {bytes_text(needed)} of memory, this machine has"
        f" {bytes_text(installed)}: {bytes_text(memory.model)} for the model and its optimizer,"
        f" {bytes_text(memory.activations)} for a micro-batch",
        "use a smaller model" if is_model else "use a smaller train.micro_batch_size",
    )


def estimate_disk(config: Config, size: ModelSize) -> Disk:
    """Return what the run's checkpoints need of the disk that its folder is, or will be, on."""
    n_ids = 0 if config.tokenizer.name == "gpt2" else config.model.vocab_size or 0
    rest = _TENSOR * size.tensors + _PER_ID * n_ids + (1 << 13)
    checkpoint = 4 * size.saved + size.optimizer_bytes + rest
    # Those that are kept, the best, the one being written beside them, and the base of adapters.
    needed = (config.train.keep_last + 2) * checkpoint + 4 * (size.parameters - size.saved)
    folder = config.run_folder / "checkpoints"
    held = sum(path.stat().st_size for path in folder.glob("*") if path.is_file())
    return Disk(checkpoint, needed, held, shutil.disk_usage(atomic.existing_folder(folder)).free)


def require_disk(config: Config, size: ModelSize) -> None:
    """Refuse a run whose checkpoints the disk cannot hold, once it has a folder for them.

    Raises:
        StorageError: With what is needed and what is free.
    """
    checkpoints = config.run_folder / "checkpoints"
    if checkpoints.is_dir() and not (disk := estimate_disk(config, size)).fits:
        raise StorageError(
            f"{checkpoints}: checkpoints of {bytes_text(disk.checkpoint)} need"
            f" {bytes_text(disk.needed)} altogether, {bytes_text(disk.free)} are free",
            "free some space, set a smaller train.keep_last, or another disk with -s run_dir=...",
        )


def _activations(config: Config, rows: int) -> int:
    """Return what the blocks save for the backward pass of a micro-batch, and what that takes.

    Measured with one and two rows through one and two blocks, and extended to the rest.
    """
    dropout = config.model.dropout if config.device == "cpu" else 0.0  # others have fused kernels
    update = {"block_size": config.seq_len, "vocab_size": 64, "dropout": dropout}
    shapes = [config.model.model_copy(update={**update, "n_layer": n}) for n in (1, 2)]
    dtype = _DTYPES[config.dtype]
    saved = partial(_saved_bytes, dtype=dtype, on_cpu=config.device == "cpu")
    one, two = (_extend(saved(shape, 1), saved(shape, 2), rows) for shape in shapes)
    # While a block goes backward, the gradients of what it saved take about as much again.
    if config.train.activation_checkpointing:
        entering = 4 * rows * config.seq_len * config.model.n_embd
        return two + config.model.n_layer * entering
    return _extend(one, two, config.model.n_layer + 1)


def _extend(one: int, two: int, n: int) -> int:
    """Return what n take, if one and two take so much."""
    return one + (n - 1) * (two - one)


@functools.cache  # a run asks before it allocates and again for its plan
def _saved_bytes(shape: ModelConfig, rows: int, dtype: torch.dtype, on_cpu: bool) -> int:
    """Return the bytes that a forward pass saves for the backward pass, weights aside.

    What our kernels for a CPU do not save, another device's operations do.
    """
    saved: dict[int, Tensor] = {}

    def save(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with _uncomputed(shape), torch.random.fork_rng(devices=[]):
        model = GPT(shape)
        freeze(model, [])
        tokens = torch.zeros(rows, shape.block_size, dtype=torch.int64)
        with (
            torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
            torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32),
            contextlib.nullcontext() if on_cpu else torch_only(),
        ):
            out = model.hidden(tokens)
        weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        del out
        return sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items()
                   if key not in weights)  # fmt: skip


def _uncomputed(shape: ModelConfig) -> AbstractContextManager[Any]:
    """Return the mode in which tensors have shapes but no memory; small models need none."""
    if 12 * shape.n_embd**2 * shape.block_size < _LARGE_PROBE:
        return contextlib.nullcontext()
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a second to import

    return FakeTensorMode()


def _loss_bytes(config: Config, rows: int) -> int:
    """Return what the loss takes beside the gradients that it leaves, see model/loss.py."""
    n_ids, dtype = config.model.vocab_size or 0, _DTYPES[config.dtype]
    tokens = rows * config.seq_len
    logits = min(tokens * n_ids * dtype.itemsize, buffer_bytes(config.device, dtype.itemsize))
    # The head in the dtype of products, unless these round it as they read it.
    rows_of_one = torch.empty(tokens, 1, dtype=dtype, device="cpu")
    rounds = config.device == "cpu" and can_multiply(rows_of_one)
    is_same = dtype == torch.float32 or rounds
    cast = 0 if is_same else n_ids * config.model.n_embd * dtype.itemsize
    if config.device != "cpu" and config.compile is not True:  # a softmax, and what it reads
        logits += 4 * (logits // dtype.itemsize) * (1 if dtype == torch.float32 else 2)
    return logits + cast + 4 * tokens * config.model.n_embd
