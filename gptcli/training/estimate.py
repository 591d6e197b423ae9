"""How much memory and disk a run will take, estimated without taking any of it.

An estimate: what compilers, allocators and libraries add is not known beforehand.
"""

import shutil
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gptcli.config.model import ModelConfig
from gptcli.config.schema import Config
from gptcli.device import available_memory, memory_bytes
from gptcli.model import GPT
from gptcli.training.fit import checkpoint_sizes
from gptcli.training.flops import flops_per_token, peak_flops
from gptcli.training.initial import freeze, n_learning
from gptcli.training.outlook import Disk, Memory, Outlook
from gptcli.training.parallel import Kind, all_local
from gptcli.training.session import Session
from gptcli.training.unusual import Counts, unusual

_KERNELS = 30_000_000  # bytes of code and buffers that the first steps load on a CPU, as measured
_PROBED = (8, 16, 32)  # tokens of the rows that are tried
_TABLE = {"cpu": 1 << 26}  # bytes of the loss's table of logits at most, see model/loss.py
_TABLE_ELSEWHERE = 1 << 29
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def look_ahead(
    config: Config, counts: Counts, kind: Kind = "none", n_processes: int = 1, taken: int = 0
) -> Outlook:
    """Estimate what a run needs, and say what is unusual about it.

    Args:
        config: Settled.
        counts: What its data and network come to.
        kind: How its processes share the network.
        n_processes: That train it.
        taken: Bytes of what is estimated that this process holds already.
    """
    model = _sketch(config)
    memory = _memory(config, model, counts.rows, kind, n_processes)
    if memory.available is not None:  # what this process holds is what it may go on to hold
        held = memory.program or taken
        memory = replace(memory, available=memory.available + held)
    memory = replace(memory, program=max(0, memory.program - taken))
    n_frozen = model.n_params() - n_learning(model)
    name = torch.cuda.get_device_name() if config.device == "cuda" else ""
    return Outlook(
        memory=memory,
        disk=disk_of(config, model),
        flops_per_token=flops_per_token(config.model, model.n_params(), n_frozen, config.seq_len),
        peak_flops=peak_flops(name, config.dtype),
        unusual=unusual(config, counts),
    )


def outlook_of(session: Session) -> Outlook:
    """Return the outlook of a run that is set up, whose memory is partly taken by now."""
    counts = Counts(
        n_params=session.model.n_params(),
        train_tokens=len(session.train_tokens),
        val_tokens=session.n_val_tokens,
        documents=session.manifest.documents,
        tokenizer_size=session.tokenizer.vocab_size,
        max_steps=session.max_steps,
        epochs=session.epochs,
        rows=session.rows,
    )
    taken = sum(local.nbytes for local in all_local(session.model.parameters()))
    return look_ahead(session.config, counts, session.kind, session.world.size, taken)


def disk_of(config: Config, model: GPT) -> Disk:
    """Return what the run's checkpoints need of the disk that its folder is, or will be, on."""
    checkpoint, needed = checkpoint_sizes(config, model)
    checkpoints = config.run_folder / "checkpoints"
    held = 0
    if checkpoints.is_dir():
        held = sum(path.stat().st_size for path in checkpoints.iterdir() if path.is_file())
    place = checkpoints.absolute()
    there = next((folder for folder in (place, *place.parents) if folder.is_dir()), Path())
    return Disk(checkpoint, needed, held, shutil.disk_usage(there).free)


def _sketch(config: Config) -> GPT:
    """Return the network with its shapes and without any memory."""
    with torch.device("meta"):
        model = GPT(config.model)
    freeze(model, config.train.freeze)
    return model


def _memory(config: Config, model: GPT, rows: int, kind: Kind, n_processes: int) -> Memory:
    n_params, n_trained = model.n_params(), n_learning(model)
    by_muon = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if config.optim.name == "muon" and parameter.requires_grad
        and parameter.dim() == 2 and name.startswith("h.")
    )  # fmt: skip
    parts = n_processes if kind == "fsdp" else 1
    gathered = 0
    if kind == "fsdp":  # a block at a time is whole, and the next is on its way
        block = sum(parameter.numel() for parameter in model.h[0].parameters())
        outside = n_params - block * config.model.n_layer
        gathered = (2 * block + outside) * _DTYPES[config.dtype].itemsize
    device = torch.device(config.device)
    return Memory(
        weights=4 * n_params // parts + gathered,
        gradients=4 * n_trained // parts,
        optimizer=(8 * n_trained - 4 * by_muon) // parts,
        activations=_activations(config, rows) + _loss_bytes(config, rows),
        program=memory_bytes(device) + _KERNELS if device.type == "cpu" else 0,
        available=available_memory(device),
        processes=n_processes if device.type == "cpu" else 1,
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
    shape: ModelConfig = config.model.model_copy(update=update)
    model = GPT(shape)
    freeze(model, [])
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    row = torch.zeros(1, tokens, dtype=torch.int64)
    dtype = _DTYPES[config.dtype]
    with (
        torch.random.fork_rng(devices=[]),
        torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
        torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32),
    ):
        out = model.hidden(row, None)
    del out
    return sum(kept.values())


def _loss_bytes(config: Config, rows: int) -> int:
    """Return what the loss takes beside the gradients that it leaves, see model/loss.py."""
    n_ids, dtype = config.model.vocab_size or 0, _DTYPES[config.dtype]
    tokens = rows * config.seq_len
    table = tokens * n_ids * dtype.itemsize
    table = min(table, _TABLE.get(config.device, _TABLE_ELSEWHERE))
    cast = n_ids * config.model.n_embd * dtype.itemsize if dtype != torch.float32 else 0
    return table + cast + 4 * tokens * config.model.n_embd
