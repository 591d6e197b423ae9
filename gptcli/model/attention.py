"""Causal attention: that of attention.c in training on a CPU, torch's elsewhere.

Letters as in gpt.py.
"""

import contextlib
import ctypes
import functools
from contextlib import AbstractContextManager
from ctypes import c_int, c_long, c_void_p
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptcli.model import kernels
from gptcli.model.extras import Packed

# Tokens up to which torch's attention on a CPU is faster in float32: its backward pass in bfloat16
# takes 7 times as long at 64 tokens, the same at 256, and less from there on.
_SHORT_CONTEXT = 128
_SOURCE = Path(__file__).with_name("attention.c")
_LONGEST_HEAD, _LONGEST = 256, 4096  # as there; a head's matrices are to fit a core's cache


class _Job(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("q", "k", "v", "y", "log_sums", "grad", "q_grad", "k_grad",
                                        "v_grad")),
        *((name, c_long * 3) for name in ("of_q", "of_k", "of_v", "of_grad")),
        *((name, c_long) for name in ("B", "H", "G", "T", "D")),
        ("next", c_int),
        ("tiles", c_int),
    ]  # fmt: skip


@functools.cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    from gptcli.native import build  # which only training on a CPU needs

    found = build(_SOURCE, options=("-DSINGLE",) if dtype == torch.float32 else ())
    if found is None or not found.can_attend():
        return None
    found.causal_attention.argtypes, found.causal_attention.restype = [c_void_p, c_int], None
    return found


Heads = tuple[Tensor, Tensor, Tensor]  # queries (B, H, T, D), keys and values (B, G, T, D)


def _run(heads: Heads, grad: Tensor | None, **tensors: Tensor) -> None:
    found = dict(zip("qkv", heads, strict=True)) | ({} if grad is None else {"grad": grad})
    (B, H, T, D), G, library = heads[0].shape, heads[1].shape[1], _library(heads[0].dtype)
    if library is None or kernels.is_fake(heads[0]):
        return
    apart = {f"of_{name}": (c_long * 3)(*t.stride()[:3]) for name, t in found.items()}
    job = _Job(B=B, H=H, G=G, T=T, D=D, **apart, **kernels.pointers(found | tensors))
    library.causal_attention(ctypes.byref(job), torch.get_num_threads())


def _attend(heads: Heads) -> tuple[Tensor, Tensor]:
    """Return what queries find, (B, T, H, D), and the logarithms of the sums of their weights."""
    q = heads[0]
    B, H, T, D = q.shape
    y, log_sums = q.new_empty(B, T, H, D), q.new_empty(B, H, T, dtype=torch.float32)
    _run(heads, None, y=y, log_sums=log_sums)
    return y, log_sums


def _attend_back(heads: Heads, grads: Heads, grad: Tensor, y: Tensor, log_sums: Tensor) -> None:
    """Fill the gradients of heads, which are as far apart as these, from that of what was found."""
    grad = grad.to(y.dtype)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    of_heads = dict(zip(("q_grad", "k_grad", "v_grad"), grads, strict=True))
    _run(heads, grad, y=y, log_sums=log_sums, **of_heads)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = q.contiguous(), k.contiguous(), v.contiguous()
        y, log_sums = _attend(heads)
        ctx.save_for_backward(*heads, y, log_sums)
        return y.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        q, k, v, y, log_sums = ctx.saved_tensors
        found = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _attend_back((q, k, v), found, grads[0], y, log_sums)
        return found


def _heads_of(rows: Tensor, H: int, G: int) -> Heads:
    """Return what c_attn gave, (B, T, (H + 2 G) D), as heads, in place."""
    B, T, width = rows.shape
    heads = rows.view(B, T, H + 2 * G, width // (H + 2 * G)).transpose(1, 2)
    q, k, v = torch.split(heads, [H, G, G], dim=1)
    return q, k, v


class _AttentionOfRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, H: int, G: int) -> Tensor:
        rows = rows.contiguous()
        y, log_sums = _attend(_heads_of(rows, H, G))
        ctx.save_for_backward(rows, y, log_sums)
        ctx.shape = H, G
        return y.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, y, log_sums = ctx.saved_tensors
        found, heads = torch.empty_like(rows), _heads_of(rows, *ctx.shape)
        _attend_back(heads, _heads_of(found, *ctx.shape), grads[0], y, log_sums)
        return found, None, None


def can_attend(rows: Tensor, head_size: int) -> bool:
    """Tell whether `attention_of_rows` takes what c_attn gave."""
    return head_size <= _LONGEST_HEAD and _is_ours(rows, rows.shape[1])


def attention_of_rows(rows: Tensor, H: int, G: int) -> Tensor:
    """Attend causally by heads that are neither normed nor rotated: nothing is copied into heads.

    Args:
        rows: What c_attn gave, (B, T, (H + 2 G) D).
        H: How many heads are queries.
        G: How many are keys, and values.

    Returns:
        (B, H, T, D).
    """
    apply: Any = _AttentionOfRows.apply
    found: Tensor = apply(rows, H, G)
    return found


def _is_ours(x: Tensor, T: int) -> bool:
    """Tell whether attention.c takes heads like x, of T tokens; without a gradient, torch does."""
    is_fit = x.requires_grad and 1 < T <= _LONGEST and kernels.can_run(x)
    return is_fit and _library(x.dtype) is not None


def fastest_dtype(rows: Tensor) -> torch.dtype:
    """Return the dtype in which heads from rows (B, T, C) attend in the least time on a CPU."""
    T = rows.shape[1]
    return rows.dtype if T > _SHORT_CONTEXT or _is_ours(rows, T) else torch.float32


def attention(q: Tensor, k: Tensor, v: Tensor, dropout: float, packed: Packed | None) -> Tensor:
    """Attend causally, within a text: queries (B, H, T, D) to keys and values (B, G, T, D)."""
    T, D = q.shape[2:]
    is_one = q.dtype == k.dtype == v.dtype and D <= _LONGEST_HEAD
    if packed is None and not dropout and is_one and _is_ours(q, T):
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
