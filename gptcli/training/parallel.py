"""How the processes of a run share a model: each has a copy (DDP), or each has shards (FSDP2).

Both are applied from outside; the model does not know. Gradients are summed over the ranks, not
averaged, for the loss is a sum over all tokens of a step.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket

from gptcli.data.loader import Batch
from gptcli.device import Runtime
from gptcli.distributed.process_group import SINGLE_PROCESS, World
from gptcli.errors import is_out_of_memory
from gptcli.model import GPT
from gptcli.model.extras import rope_cache
from gptcli.model.gpt import Block, Shared


def apply_fsdp(model: GPT, compute: Runtime, world: World = SINGLE_PROCESS) -> str | None:
    """Leave each process a shard of every parameter (FSDP2; Zhao et al. 2023).

    Full parameters exist only while their block computes. With a 16-bit dtype they are gathered
    in it, gradients are reduced in float32.

    To compile, each block is compiled inside of the hooks that gather its parameters, which a
    compiler cannot read; returned is why blocks that should have been compiled are not.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import (
        FSDPModule,
        MixedPrecisionPolicy,
        fully_shard,
        register_fsdp_forward_method,
    )

    mesh = init_device_mesh(compute.device.type, (dist.get_world_size(),))
    is_16_bit = compute.dtype != torch.float32
    policy = MixedPrecisionPolicy(
        param_dtype=compute.dtype if is_16_bit else None,
        reduce_dtype=torch.float32 if is_16_bit else None,
        cast_forward_inputs=False,
    )
    failure = None
    if compute.compile:  # a separate block is tried: one that fails leaves shards half gathered
        block = torch.compile(Block(model.config, 0).to(compute.device), dynamic=False)
        x = torch.zeros(1, 16, model.config.n_embd, device=compute.device)
        positions = torch.arange(16, device=x.device)
        rotation = rope_cache(positions, model.config) if model.wpe is None else None
        shared = Shared(x, rotation)
        failure = compiler_failure(lambda: block(x, None, shared).sum(), compute, world)
        if failure is None:
            model.compile_blocks()
    for module in (*model.h, model):
        # Freed after the forward pass, the root too: outside of it, its parameters are shards.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        cast(FSDPModule, module).set_gradient_divide_factor(1.0)
        cast(FSDPModule, module).set_force_sum_reduction_for_comms(True)
    for method in ("token_losses", "next_logits"):
        register_fsdp_forward_method(model, method)
    return failure


def compiler_failure(
    forward: Callable[[], Tensor], compute: Runtime, world: World, *, strict: bool = False
) -> str | None:
    """Return why a pass forward and backward does not compile, on any rank; None if it does.

    Raises:
        Exception: It lacked memory, of which an uncompiled model takes more still; with `strict`,
            whatever it was.
    """
    failure = None
    try:
        with warnings.catch_warnings(action="ignore"):  # about tensors that the tracer itself makes
            with compute.autocast():
                loss = forward()
            torch.autograd.backward(loss)
    except Exception as error:
        if strict or is_out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        failure = f"not compiled: {reason}"
    if not world.all_reduce_max(failure is not None):  # all ranks must do the same
        return None
    return failure or "not compiled: it failed on another rank"


def wrap_ddp(model: GPT, compute: Runtime, batch: Batch, recompute: bool) -> nn.Module:
    """Return a model whose backward pass sums the gradients over the ranks (DDP).

    A batch of the shape of a micro-batch is passed through it once.
    """
    from torch.nn.parallel import DistributedDataParallel

    copies = DistributedDataParallel(model, init_sync=False, gradient_as_bucket_view=True)

    def sum_up(group: object, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        summed: torch.futures.Future[Any] = dist.all_reduce(
            bucket.buffer(), async_op=True
        ).get_future()
        return summed.then(lambda done: cast(Tensor, done.value()[0]))

    copies.register_comm_hook(None, sum_up)
    # After its first pass DDP rebuilds its buckets in the order in which gradients come. Without
    # this pass, a resumed run would sum its first step in another order than one not stopped.
    with compute.autocast():
        loss = copies(*batch, recompute=recompute).loss
    torch.autograd.backward(loss)
    copies.zero_grad(set_to_none=True)
    return copies


@contextlib.contextmanager
def gradient_sync(model: nn.Module, sync: bool) -> Iterator[None]:
    """Let the backward pass in the block sum gradients over the ranks, or only accumulate.

    A sharded model always sums them: gradients that wait for their sum are full on every rank, and
    take as much memory as the model that did not fit.
    """
    null = contextlib.nullcontext
    with null() if sync else getattr(model, "no_sync", null)():  # DDP has no_sync
        yield


@contextlib.contextmanager
def sharded_inference(model: GPT, compute: Runtime) -> Iterator[None]:
    """Evaluate or decode with a sharded model: gathered in the dtype of products, not compiled.

    The blocks that train are called here too, and a compiler would generate code for every length
    of a text. Other models are left alone.
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
    """Tell whether the elements of a tensor are spread over the ranks."""
    return hasattr(tensor, "full_tensor")


def to_local(tensor: Tensor) -> Tensor:
    """Return the local shard of a tensor, in the same memory."""
    if not is_dtensor(tensor):  # asked of every parameter, several times a step
        return tensor
    with torch.no_grad():
        return cast(Tensor, cast(Any, tensor).to_local())


def as_dtensor(shard: Tensor, parameter: Tensor) -> Tensor:
    """Return a local shard as a tensor spread over the ranks as `parameter` is."""
    if not is_dtensor(parameter) or not shard.dim():
        return shard
    from torch.distributed.tensor import DTensor

    spread = cast(DTensor, parameter)
    return DTensor.from_local(
        shard, spread.device_mesh, spread.placements,
        run_check=False, shape=spread.shape, stride=spread.stride(),
    )  # fmt: skip


def full_tensor(tensor: Tensor) -> Tensor:
    """Return all of a tensor; a collective call."""
    return cast(Any, tensor).full_tensor() if is_dtensor(tensor) else tensor


def local_shard(full: Tensor, parameter: Tensor) -> Tensor:
    """Return this process's shard of a tensor that is spread as `parameter` is."""
    if not is_dtensor(parameter) or not full.dim():
        return full
    size, rank = dist.get_world_size(), dist.get_rank()
    parts = full.chunk(size)  # there may be fewer than ranks
    return parts[rank] if rank < len(parts) else full[:0]


def gather_full(tensors: Mapping[str, Tensor], keep: bool, copy: bool = False) -> dict[str, Tensor]:
    """Return full tensors on the ranks that `keep` them: gathered ones are copies on the CPU.

    With `copy`, all are. A collective call, with the same names in the same order on every rank.
    """
    full = {}
    for name, tensor in tensors.items():
        gathered = full_tensor(tensor.detach())
        if keep:
            is_spread = is_dtensor(tensor)
            full[name] = gathered.to("cpu", copy=not is_spread) if copy or is_spread else gathered
    return full


@torch.no_grad()
def scatter_from_rank0(
    world: World, parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]
) -> None:
    """Fill every rank's parameters with rank 0's full values by name, or its shards of them."""
    for name, parameter in parameters.items():
        local = to_local(parameter)
        if world.size == 1:
            local.copy_(values[name])
            continue
        full = torch.empty(parameter.shape, dtype=parameter.dtype, device=local.device)
        if world.is_main:
            full.copy_(values[name])
        world.broadcast(full)
        local.copy_(local_shard(full, parameter))


def all_local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the local shard of each tensor."""
    return [to_local(tensor) for tensor in tensors]
