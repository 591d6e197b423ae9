"""Causal attention: that of attention.c in training on a CPU, torch's elsewhere.

Letters as in gpt.py.
"""

import contextlib
import ctypes
import functools
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gptcli.model import kernels
from gptcli.model.extras import Packed
from gptcli.model.products import (
    can_learn,
    gradient_of_x,
    gradients_of_layer,
    multiply_layer,
    products_dtype,
)

# Tokens up to which torch's attention on a CPU is faster in float32: its backward pass in bfloat16
# takes 7 times as long at 64 tokens, the same at 256, and less from there on.
_SHORT_CONTEXT = 128
_SOURCE = Path(__file__).with_name("attention.c")
_LONGEST_HEAD, _LONGEST = 256, 4096  # as there; a head's matrices are to fit a core's cache


@functools.cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    from gptcli.native import build  # which only training on a CPU needs

    found = build(_SOURCE, options=("-DSINGLE",) if dtype == torch.float32 else ())
    return found if found is not None and found.can_attend() else None


Heads = tuple[Tensor, Tensor, Tensor]  # queries (B, H, T, D), keys and values (B, G, T, D)
_Place = tuple[int, int, int, int]  # in memory, and how far texts, heads and tokens are apart
_Places = tuple[_Place, _Place, _Place]  # of heads
_Shape = tuple[int, int, int, int, int]  # B, H, G, T, D
_NONE = 0, 0, 0, 0
_JOB = "P3q P3q P3q P3q P3q P3q P3q 2P 5q 8x"  # of attention.c


def _attend(x: Tensor, places: _Places, shape: _Shape) -> tuple[Tensor, Tensor]:
    """Return what queries find, (B, T, H, D), and the logarithms of the sums of their weights.

    x is what holds the heads, or some of them.
    """
    B, H, _, T, D = shape
    y, log_sums = x.new_empty(B, T, H, D), x.new_empty(B, H, T, dtype=torch.float32)
    _run(places, (_NONE,) * 3, None, (y, log_sums), shape)
    return y, log_sums


def _run(
    places: _Places,
    grad_places: _Places,
    grad: Tensor | None,
    found: tuple[Tensor, Tensor],
    shape: _Shape,
) -> None:
    """Fill what `_attend` returns, or the gradients of heads from that of what was found."""
    y, log_sums = found
    library = _library(y.dtype)
    if library is None or kernels.is_fake(y):
        return
    if grad is not None:
        grad = grad.to(y.dtype)
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    heads = chain(*places, *grad_places, _NONE if grad is None else _place(grad))
    kernels.call(library.causal_attention, _JOB, *heads, *kernels.at(y, log_sums), *shape)


def _place(heads: Tensor) -> _Place:
    [at], (b, h, t, _) = kernels.at(heads), heads.stride()
    return at, b, h, t


def _places(heads: tuple[Tensor, ...]) -> _Places:
    q, k, v = heads
    return _place(q), _place(k), _place(v)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads, (B, H, T, D) = (q.contiguous(), k.contiguous(), v.contiguous()), q.shape
        ctx.shape = B, H, k.shape[1], T, D
        y, log_sums = _attend(q, _places(heads), ctx.shape)
        ctx.save_for_backward(*heads, y, log_sums)
        return y.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        *heads, y, log_sums = ctx.saved_tensors
        of_heads = tuple(map(torch.empty_like, heads))
        _run(_places(tuple(heads)), _places(of_heads), grads[0], (y, log_sums), ctx.shape)
        return of_heads


def _places_in(rows: Tensor, shape: _Shape) -> _Places:
    """Return where the heads are in what c_attn gave, (B, T, (H + 2 G) D)."""
    _, H, G, T, D = shape
    [at] = kernels.at(rows)
    width, size = (H + 2 * G) * D, rows.element_size()
    apart = T * width, D, width
    k_at = at + H * D * size
    return (at, *apart), (k_at, *apart), (k_at + G * D * size, *apart)


class _Branch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, H: int, G: int, x: Tensor, *layers: Tensor | None
    ) -> Tensor:
        weight, bias, proj, proj_bias = layers
        assert weight is not None and proj is not None
        (B, T, _), ctx.of_x, x = x.shape, x.dtype, x.to(dtype)
        rows = multiply_layer(x, weight, bias)
        ctx.shape = B, H, G, T, rows.shape[2] // (H + 2 * G)
        y, log_sums = _attend(rows, _places_in(rows, ctx.shape), ctx.shape)
        ctx.save_for_backward(x if weight.requires_grad else None, weight, proj, rows, y, log_sums)
        return multiply_layer(y.flatten(2), proj, proj_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight, proj, rows, y, log_sums), shape = ctx.saved_tensors, ctx.shape
        [grad], needs = grads, ctx.needs_input_grad[4:]
        of_y = gradient_of_x(grad, proj, y.dtype).view(y.shape).transpose(1, 2)
        of_rows = torch.empty_like(rows)
        places = _places_in(rows, shape), _places_in(of_rows, shape)
        _run(*places, of_y, (y, log_sums), shape)
        of_x = gradient_of_x(of_rows, weight, ctx.of_x)
        of_attn = gradients_of_layer(of_rows, x, weight, needs[:2])
        of_proj = gradients_of_layer(grad, y.flatten(2), proj, needs[2:])
        return None, None, None, of_x, *of_attn, *of_proj


def can_attend(x: Tensor, head_size: int) -> bool:
    """Tell whether `attention_branch` takes what c_attn would."""
    is_fit = head_size <= _LONGEST_HEAD and can_learn(x)
    return is_fit and _is_ours(x, x.shape[1], products_dtype(x))


def attention_branch(x: Tensor, c_attn: nn.Linear, c_proj: nn.Linear, H: int, G: int) -> Tensor:
    """Attend causally by heads that are neither normed nor rotated: nothing is copied into heads.

    One step of the backward pass, for each step costs time.

    Args:
        x: (B, T, C).
        c_attn: What gives the rows of all heads, (B, T, (H + 2 G) D).
        c_proj: What takes what they found, (B, T, H D).
        H: How many heads are queries.
        G: How many are keys, and values.

    Returns:
        (B, T, C).
    """
    layers = c_attn.weight, c_attn.bias, c_proj.weight, c_proj.bias
    apply: Any = _Branch.apply
    found: Tensor = apply(products_dtype(x), H, G, x, *layers)
    return found


def _is_ours(x: Tensor, T: int, dtype: torch.dtype) -> bool:
    """Tell whether attention.c takes heads from x, of T tokens; without a gradient, torch does."""
    is_fit = x.requires_grad and 1 < T <= _LONGEST and kernels.can_run(x)
    return is_fit and _library(dtype) is not None


def fastest_dtype(rows: Tensor) -> torch.dtype:
    """Return the dtype in which heads from rows (B, T, C) attend in the least time on a CPU."""
    T = rows.shape[1]
    return rows.dtype if T > _SHORT_CONTEXT or _is_ours(rows, T, rows.dtype) else torch.float32


def attention(q: Tensor, k: Tensor, v: Tensor, dropout: float, packed: Packed | None) -> Tensor:
    """Attend causally, within a text: queries (B, H, T, D) to keys and values (B, G, T, D)."""
    T, D = q.shape[2:]
    is_one = q.dtype == k.dtype == v.dtype and D <= _LONGEST_HEAD
    if packed is None and not dropout and is_one and _is_ours(q, T, q.dtype):
        apply: Any = _Attention.apply
        found: Tensor = apply(q, k, v)
        return found
    autocast: AbstractContextManager[Any] = contextlib.nullcontext()
    if q.device.type == "cpu" and T <= _SHORT_CONTEXT:
        q, k, v = q.float(), k.float(), v.float()
        autocast = torch.autocast("cpu", enabled=False)
    if packed is not None and q.is_cuda:  # its kernels take a mask or grouped queries, not both
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    grouped = k.shape[1] != q.shape[1]
    mask = None if packed is None else packed.mask.to(q.dtype)
    with autocast:
        y: Tensor = F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p=dropout, is_causal=mask is None, enable_gqa=grouped
        )
    return y
