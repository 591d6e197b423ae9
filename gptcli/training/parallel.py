"""How the processes of a run share a network: each has it whole (DDP), or each has shards (FSDP2).

Both are applied from outside; the network does not know. Gradients are summed over the ranks, not
averaged, for the loss is a sum over all tokens of a step.
"""

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket

from gptcli.config.schema import Config
from gptcli.device import Runtime, available_memory
from gptcli.distributed.process_group import World
from gptcli.errors import ConfigError, is_out_of_memory
from gptcli.model import GPT
from gptcli.model.gpt import Block, rope_cache

Parallelism = Literal["none", "ddp", "fsdp"]
_BYTES_PER_PARAMETER = 16  # weight, gradient and two averages, in float32
_SHARE = 0.6  # of the memory there is, to be had by them; activations want some too


def choose_parallelism(
    config: Config, world: World, n_params: int, device: torch.device
) -> Parallelism:
    """Say how the processes share a network: whole while it fits, else in shards.

    Raises:
        ConfigError: The configuration asks for what shards cannot do.
    """
    if world.size == 1:
        return "none"
    kind = config.train.parallel
    if kind == "auto":
        free = available_memory(device)
        needed = _BYTES_PER_PARAMETER * n_params
        kind = "ddp" if free is None or needed <= _SHARE * free else "fsdp"
    if kind == "fsdp" and config.dtype == "float16":
        raise ConfigError(
            "dtype: float16 scales its loss, which shards do not support", "set dtype=bfloat16"
        )
    if kind == "fsdp" and config.train.micro_batch_size == "auto":
        raise ConfigError("train.micro_batch_size: auto is not supported with fsdp; give a number")
    return kind


def apply_fsdp(model: GPT, compute: Runtime) -> str | None:
    """Leave each process a share of every parameter (FSDP2; Zhao et al. 2023).

    Whole parameters exist only while their block computes. With a 16-bit dtype they are gathered
    in it, gradients are reduced in float32.

    Args:
        model: On any device; its shards are on that of `compute`.
        compute: Device and precision; with `compile`, each block is compiled, inside of the hooks
            that gather its parameters, which a compiler cannot read.

    Returns:
        Why blocks that should have been compiled are not.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    mesh = init_device_mesh(compute.device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if compute.dtype != torch.float32:
        policy = MixedPrecisionPolicy(
            param_dtype=compute.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    failure = _compile_failure(model, compute) if compute.compile else None
    if compute.compile and failure is None:
        model.compile_blocks()
    for module in (*model.h, model):
        # Freed after the forward pass, the root too: what is named outside of it are the shards.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        cast(FSDPModule, module).set_gradient_divide_factor(1.0)
        cast(FSDPModule, module).set_force_sum_reduction_for_comms(True)
    for method in ("token_losses", "next_logits"):
        register_fsdp_forward_method(model, method)
    return failure


def _compile_failure(model: GPT, compute: Runtime) -> str | None:
    """Return why a block does not compile, on any of the ranks; None if it does.

    A block of its own is tried, for one of FSDP's that fails leaves its shards half gathered.
    """
    block = Block(model.config, 0).to(compute.device)
    x = torch.zeros(1, 16, model.config.n_embd, device=compute.device)
    failure = None
    try:
        with quiet_compiler(), compute.autocast():
            rotation = rope_cache(0, 16, model.config, x.device) if model.wpe is None else None
            y = torch.compile(block, dynamic=False)(x, rotation, None)
            torch.autograd.backward(y.sum())
    except Exception as error:
        failure = compile_failure(error)
    failed = torch.tensor(failure is not None, dtype=torch.int32)
    dist.all_reduce(failed, dist.ReduceOp.MAX)
    return failure or ("not compiled: it failed on another rank" if failed else None)


@contextlib.contextmanager
def quiet_compiler() -> Iterator[None]:
    """Silence the tracer, which warns about tensors that it makes itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def compile_failure(error: Exception) -> str:
    """Return what to say of a compiler that failed.

    Raises:
        Exception: It lacked memory, and a model that is not compiled takes more still.
    """
    if is_out_of_memory(error):
        raise error
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
    return f"not compiled: {reason}"


def wrap_ddp(network: GPT, compute: Runtime, tokens: Tensor, recompute: bool) -> nn.Module:
    """Return `network` with its gradients summed over the ranks in the backward pass (DDP).

    Args:
        network: The same on every rank.
        compute: Where it is, and in what precision.
        tokens: (B, T) int64, of the shape of a micro-batch: they are passed through once.
        recompute: As in training.
    """
    from torch.nn.parallel import DistributedDataParallel

    copies = DistributedDataParallel(network, init_sync=False, gradient_as_bucket_view=True)

    def add_up(group: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        summed: torch.futures.Future[Any] = dist.all_reduce(
            bucket.buffer(), async_op=True
        ).get_future()
        return summed.then(lambda done: cast(Tensor, done.value()[0]))

    copies.register_comm_hook(None, add_up)
    # After its first pass it lays out its buffers anew, in the order in which gradients come. A
    # run that is resumed would otherwise sum its first step in another order than one that is not.
    with compute.autocast():
        loss = copies(tokens, tokens, recompute=recompute).loss
    torch.autograd.backward(loss)
    copies.zero_grad(set_to_none=True)
    return copies


@contextlib.contextmanager
def gradient_sync(network: nn.Module, sync: bool) -> Iterator[None]:
    """Let the backward pass in the block sum gradients over the ranks, or only add up its own.

    A model in shards always sums them: gradients that wait for their sum are whole on every rank,
    and take as much memory as the model that did not fit.
    """
    if sync or not hasattr(network, "no_sync"):
        yield
    else:
        with cast(Any, network).no_sync():
            yield


@contextlib.contextmanager
def sharded_inference(model: GPT, compute: Runtime) -> Iterator[None]:
    """Evaluate or decode with a model in shards: gathered in the dtype of products, not compiled.

    The blocks that train are the ones called here, and a compiler would make new code for every
    length of a text. Other models are left alone.
    """
    if not hasattr(model, "unshard"):
        yield
        return
    with contextlib.ExitStack() as stack:
        stack.enter_context(compute.autocast())
        if model.is_compiled:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


def is_dtensor(tensor: Tensor) -> bool:
    """Tell whether a tensor is one whose elements are spread over the ranks."""
    return hasattr(tensor, "full_tensor")


@torch.no_grad()
def to_local(tensor: Tensor) -> Tensor:
    """Return what this process has of a tensor, in the same memory."""
    return cast(Any, tensor).to_local() if is_dtensor(tensor) else tensor


def as_dtensor(share: Tensor, parameter: Tensor) -> Tensor:
    """Return a share as what it is a share of: a tensor spread as `parameter` is."""
    if not is_dtensor(parameter) or not share.dim():
        return share
    from torch.distributed.tensor import DTensor

    spread = cast(DTensor, parameter)
    return DTensor.from_local(
        share, spread.device_mesh, spread.placements,
        run_check=False, shape=spread.shape, stride=spread.stride(),
    )  # fmt: skip


def full_tensor(tensor: Tensor) -> Tensor:
    """Return all of a tensor; every rank must ask."""
    return cast(Any, tensor).full_tensor() if is_dtensor(tensor) else tensor


def local_shard(full: Tensor, parameter: Tensor) -> Tensor:
    """Return what belongs to this process of a tensor that is spread as `parameter` is."""
    if not is_dtensor(parameter) or not full.dim():
        return full
    size, rank = dist.get_world_size(), dist.get_rank()
    parts = full.chunk(size)  # there may be fewer than ranks
    return parts[rank] if rank < len(parts) else full[:0]


def gather_full(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Return whole tensors, on the CPU unless they were whole already.

    Args:
        tensors: The same names in the same order on every rank.
        keep: Whether this rank wants them; others only take part.
    """
    found = {}
    for name, tensor in tensors.items():
        full = full_tensor(tensor.detach())
        if keep:
            found[name] = full.cpu() if is_dtensor(tensor) else full
    return found


@torch.no_grad()
def scatter_from_rank0(
    world: World, parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> None:
    """Give every rank the values of rank 0, or its share of them.

    Args:
        world: The ranks.
        parameters: To be filled, by name.
        values: On rank 0 as many whole tensors; not looked at elsewhere.
    """
    for name, parameter in parameters.items():
        mine = to_local(parameter)
        if world.size == 1:
            mine.copy_(values[name])
            continue
        full = torch.empty(parameter.shape, dtype=parameter.dtype, device=mine.device)
        if world.is_main:
            full.copy_(values[name])
        world.broadcast(full)
        mine.copy_(local_shard(full, parameter))


def rows_of(config: Config, n_processes: int) -> int:
    """Return the rows of a micro-batch: at most those asked for, and as many on every rank.

    Raises:
        ConfigError: A step's rows cannot be dealt out evenly.
    """
    n_rows = config.tokens_per_step // config.seq_len
    if n_rows % n_processes:
        fewer = next(n for n in range(n_processes, 0, -1) if n_rows % n == 0)
        more = -(-n_rows // n_processes) * n_processes * config.seq_len
        raise ConfigError(
            f"train.tokens_per_step: a step of {n_rows} rows of {config.seq_len} tokens cannot be"
            f" dealt out evenly among {n_processes} processes",
            f"use {fewer} processes, or -s train.tokens_per_step={more}",
        )
    each = n_rows // n_processes
    return next(rows for rows in range(min(config.rows, each), 0, -1) if each % rows == 0)


def all_local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return what this process has of each tensor."""
    return [to_local(tensor) for tensor in tensors]
