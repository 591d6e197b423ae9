"""How many rows fit in memory, and whether compiling pays."""

import torch
from torch import Tensor

from gptcli.config.schema import Config
from gptcli.device import Runtime, available_memory
from gptcli.errors import MemoryLimitError
from gptcli.model import GPT

_SHARE = 0.6  # of the memory there is; the allocator and the optimizer want some too
# What compiling takes, with a cold cache, and saves on two cores. It saves what is not in matrix
# products, which is proportional to channels: 24 and 25 ns for each of a token, at 128 and at 256.
# It took 34 s at four blocks; how much of that each block takes was not measured.
_SAVED_SECONDS = 25e-9
_COMPILE_SECONDS, _COMPILE_SECONDS_PER_BLOCK = 20.0, 3.5
_ENOUGH_TOKENS = 8192  # of a micro-batch on a CPU, from where on more is not faster


def fitting_rows(config: Config, model: GPT, machine: Runtime) -> int:
    """Return the most rows of a micro-batch that fit in memory and divide a step.

    On CUDA it is tried; on a CPU, where asking for too much ends the process, it is computed from
    what one row keeps for its backward pass.

    Raises:
        MemoryLimitError: Not even one row fits.
    """
    n_rows = config.tokens_per_step // config.seq_len
    candidates = [rows for rows in range(n_rows, 0, -1) if n_rows % rows == 0]
    if machine.device.type == "cuda":
        for rows in candidates:
            if _runs(config, model, machine, rows):
                return rows
    else:
        free = available_memory(machine.device)
        limit = (
            n_rows if free is None else int(_SHARE * free / _bytes_of_row(config, model, machine))
        )
        limit = min(limit, max(1, _ENOUGH_TOKENS // config.seq_len))
        for rows in candidates:
            if rows <= limit:
                return rows
    raise MemoryLimitError(
        f"not even one row of {config.seq_len} tokens fits in memory",
        "use a smaller network, a shorter data.seq_len, or dtype=bfloat16",
    )


def _batch(config: Config, rows: int, device: torch.device) -> Tensor:
    return torch.zeros(rows, config.seq_len, dtype=torch.int64, device=device)


def _bytes_of_row(config: Config, model: GPT, machine: Runtime) -> int:
    """Return what a forward pass of one row keeps until the backward pass, in bytes."""
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = _batch(config, 1, machine.device)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        with machine.autocast():
            loss = model(tokens, tokens).loss
    del loss
    return sum(kept.values())


def _runs(config: Config, model: GPT, machine: Runtime, rows: int) -> bool:
    """Try a forward and backward pass."""
    tokens = _batch(config, rows, machine.device)
    try:
        with machine.autocast():
            torch.autograd.backward(model(tokens, tokens).loss)
        # Two averages for each weight are still to come.
        spare = torch.empty(2 * model.n_params(), device=machine.device)
        del spare
    except torch.OutOfMemoryError:
        return False
    finally:
        model.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    return True


def compiling_pays(config: Config, max_steps: int) -> bool:
    """Tell whether a run is long enough to be worth compiling its network first."""
    if config.device != "cpu":
        return config.device == "cuda"
    saved = max_steps * config.tokens_per_step * _saved_seconds(config)
    return saved > compile_seconds(config)


def compile_seconds(config: Config) -> float:
    """Return what compiling takes, with a cold cache."""
    return _COMPILE_SECONDS + _COMPILE_SECONDS_PER_BLOCK * config.model.n_layer


def compiled_seconds(config: Config, seconds: float) -> float:
    """Return what a token takes that took `seconds` not compiled; on a GPU that is not known."""
    saved = _saved_seconds(config) if config.device == "cpu" else 0.0
    return max(seconds / 2, seconds - saved)


def _saved_seconds(config: Config) -> float:
    """Return what compiling saves of a token on a CPU."""
    return config.model.n_layer * config.model.n_embd * _SAVED_SECONDS
