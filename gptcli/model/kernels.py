"""kernels.c: what lies between the products of a training step on a CPU, each in one pass.

A small network spends as long on it as on its products. A gradient cannot be differentiated again.
Letters as in gpt.py.
"""

import contextlib
import ctypes
import functools
import struct
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from math import ceil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_SOURCE = Path(__file__).with_name("kernels.c")
SHORTEST, _LONGEST, _ROWS, _CHUNK = 32, 256, 32, 8192  # as there
_HALF = torch.bfloat16
_KINDS = ("relu2", "swiglu", "gelu", "gelu_erf")  # as there


# The structures there, as `struct.pack` has them; what the threads count, zero, is the last.
_HEADS, _NORM, _LOSSES, _PASS = "11P8qf4x", "5P5qf4x", "3P2q2i4x", "5Pq2i4x"

_in_use = True


@contextlib.contextmanager
def torch_only() -> Iterator[None]:
    """Use torch's operations during the block, as other devices do."""
    global _in_use
    before, _in_use = _in_use, False
    try:
        yield
    finally:
        _in_use = before


def can_run(x: Tensor) -> bool:
    """Tell whether the kernels take x: on a CPU, where torch compiles no others."""
    is_one = _in_use and not torch.compiler.is_compiling() and x.is_cpu
    return is_one and x.dtype in (torch.float32, _HALF) and _library() is not None


@functools.cache
def _library() -> ctypes.CDLL | None:
    from gptcli.native import build  # which only training on a CPU needs

    return build(_SOURCE)


def can_split(rows: Tensor, head_size: int, is_offset: bool) -> bool:
    """Tell whether `split_heads` takes what c_attn gave."""
    is_whole = SHORTEST <= head_size <= _LONGEST and head_size % (4 if is_offset else 2) == 0
    return is_whole and can_run(rows)


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of the squares of all numbers, a float64 scalar, on the tensors' device."""
    is_ours = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
    library = _library() if is_ours else None
    if library is None:
        # A Mac's GPU has no float64.
        dtype = torch.float32 if tensors[0].device.type == "mps" else torch.float64
        norms = torch.stack(torch._foreach_norm(list(tensors), 2, dtype=dtype))
        return (norms * norms).sum()
    whole = [t.contiguous() for t in tensors]
    sizes = [t.numel() for t in whole]
    ends = list(accumulate(ceil(size / _CHUNK) for size in sizes))
    sums = torch.empty(ends[-1], dtype=torch.float64)
    fields = chain.from_iterable(zip(at(*whole), sizes, ends, strict=True))
    call(library.sum_of_squares, f"Pq8x{3 * len(whole)}q", *at(sums), len(whole), *fields)
    return sums.sum()


def split_heads(
    rows: Tensor,
    value: Tensor | None,
    weights: tuple[Tensor, Tensor] | tuple[None, None],
    rotation: Tensor | None,
    shape: tuple[int, int, int],
    eps: float,
    is_offset: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries (B, H, T, D), keys and values (B, G, T, D).

    Args:
        rows: What c_attn gave, (B, T, (H + 2 G) D), float32 or bfloat16.
        value: What is added to the values, (B, T, G D) float32.
        weights: Of the norms of queries and of keys, (D) float32; None without norms.
        rotation: Cosines and sines, (2, T, D) float32.
        shape: H, G and D.
        eps: Of the norms.
        is_offset: Whether the late half of each key moves one token on.
        dtype: Of what is returned: float32 or bfloat16.
    """
    apply: Any = _SplitHeads.apply
    found: tuple[Tensor, Tensor, Tensor] = apply(
        rows, value, *weights, rotation, shape, eps, is_offset, dtype
    )
    return found


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        value: Tensor | None,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        rotation: Tensor | None,
        shape: tuple[int, int, int],
        eps: float,
        is_offset: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, ...]:
        (B, T, _), (H, G, D), rows = rows.shape, shape, rows.contiguous()
        value = None if value is None else value.contiguous()
        heads = tuple(rows.new_empty(B, n, T, D, dtype=dtype) for n in (H, G, G))
        ctx.save_for_backward(None if q_weight is None else rows, q_weight, k_weight, rotation)
        halves = rows.dtype == _HALF, dtype == _HALF
        ctx.values = B, T, H, G, D, is_offset, *halves, eps
        ctx.of_rows, ctx.has_value = (rows.shape, rows.dtype), value is not None
        places = at(rows, None, q_weight, k_weight, rotation, value, *heads, None, None)
        _run("heads", rows, _HEADS, *places, *ctx.values)
        return heads

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        rows, q_weight, k_weight, rotation = ctx.saved_tensors
        (B, T, width), dtype = ctx.of_rows
        q, k, v = (grad.contiguous() for grad in grads)
        (G, D), grad = ctx.values[3:5], q.new_empty(B, T, width, dtype=dtype)
        value_grad = q.new_empty(B, T, G * D, dtype=torch.float32) if ctx.has_value else None
        parts = q.new_zeros(ceil(B * T / _ROWS), 2, D, dtype=torch.float32)
        weights = q_weight, k_weight, rotation
        places = at(rows, grad, *weights, None, q, k, v, value_grad, parts)
        _run("heads", grad, _HEADS, *places, *ctx.values)
        weight_grads = (None, None) if q_weight is None else parts.sum(0).unbind()
        return grad, value_grad, *weight_grads, None, None, None, None, None


def is_fake(x: Tensor) -> bool:
    """Tell whether x has a shape only: nothing is computed for an estimate of memory."""
    return type(x).__name__ == "FakeTensor"


def at(*tensors: Tensor | None) -> list[int]:
    """Return where tensors are in memory; 0 for none, and for those that have a shape only."""
    return [0 if t is None or is_fake(t) else t.data_ptr() for t in tensors]


def call(function: Any, layout: str, *fields: float) -> None:
    """Call a function of C with a structure, laid out as by `struct.pack`, and torch's threads.

    ctypes takes five times as long to make one, which counts in small networks. The function writes
    to it what its threads have taken: each call packs another.
    """
    function(struct.pack(layout, *fields), torch.get_num_threads())


def _run(name: str, x: Tensor, layout: str, *fields: float) -> None:
    """Call a function of kernels.c, unless there is nothing to compute with."""
    library = _library()
    if library is not None and not is_fake(x):
        call(getattr(library, name), layout, *fields)


def can_normalize(x: Tensor, weight: Tensor) -> bool:
    """Tell whether `rms_norm` takes x; without a gradient, torch is as fast."""
    is_whole = x.shape[-1] % 16 == 0 and weight.dtype == torch.float32
    return is_whole and x.requires_grad and can_run(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Return x (..., C) divided by its root mean square, times a weight (C), in a dtype."""
    apply: Any = _RMSNorm.apply
    y: Tensor = apply(x, weight, eps, dtype)
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _normalize(x, weight, eps, torch.empty_like(x, dtype=dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad, n_rows = grads[0].contiguous(), x.numel() // x.shape[-1]
        parts = torch.zeros(ceil(n_rows / _ROWS), x.shape[-1], device=grad.device)
        of_x = _normalize(x, weight, ctx.eps, torch.empty_like(x), grad, parts)
        return of_x, parts.sum(0), None, None


def _normalize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    y: Tensor,
    grad: Tensor | None = None,
    weight_grads: Tensor | None = None,
) -> Tensor:
    """Fill y, and the gradients of the weight by chunks."""
    halves = (t is not None and t.dtype == _HALF for t in (x, grad, y))
    C = x.shape[-1]
    places = at(x, grad, weight, y, weight_grads)
    _run("normalize", x, _NORM, *places, x.numel() // C, C, *halves, eps)
    return y


def losses(logits: Tensor, targets: int, needs_grad: bool) -> Tensor | None:
    """Return the losses (N,) of logits (N, V) as `loss.py` does; None where it is torch's to do.

    Args:
        logits: Overwritten by their gradient if that is needed.
        targets: Where N ids, int64, are in memory.
        needs_grad: Whether it is.
    """
    if not can_run(logits):
        return None
    (n, V), half, found = logits.shape, logits.dtype == _HALF, torch.empty(len(logits))
    fields = *at(logits), targets, *at(found), n, V, half, needs_grad
    _run("losses", logits, _LOSSES, *fields)
    return found


def activate(kind: str, x: Tensor, up: Tensor | None) -> Tensor:
    """Return what `activation` of products.py does."""
    if kind == "gelu_erf":  # torch is as fast
        return F.gelu(x)
    y = torch.empty_like(x)
    _activate(kind, x, up, None, y, None)
    return y


def activate_back(
    kind: str, x: Tensor, up: Tensor | None, grad: Tensor, y: Tensor | None
) -> Tensor | None:
    """Turn the gradient of the value into that of x, in place; return that of up.

    The value is found on the way: it fills y, if that is given.
    """
    up_grad = None if up is None else torch.empty_like(up)
    _activate(kind, x, up, grad, y, up_grad)
    return up_grad


def _activate(kind: str, x: Tensor, *others: Tensor | None) -> None:
    """Fill the value and the gradients that are given; all are in the order of `_PASS`."""
    places, is_half = at(x, *others), x.dtype == _HALF
    _run("activate", x, _PASS, *places, x.numel(), _KINDS.index(kind), is_half)
