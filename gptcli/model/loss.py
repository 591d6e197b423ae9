"""Chunked linear cross-entropy: the gradient overwrites the logits.

Plain cross-entropy keeps four float32 buffers of N x V: with 50,257 tokens and a batch of 2,048
that is 1.6 GB. Here there is one, in the precision of the matmuls, processed in chunks that stay in
the processor's caches while the logits are there, so no product is computed twice (as in Liger
Kernel, Hsu et al. 2024). Letters as in gpt.py; N = B T.
"""

import functools
from collections.abc import Callable
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100  # a target that does not count, as in torch's cross entropy
_PIECE = 1 << 20  # numbers at a time, on a CPU
_TABLE = 1 << 26  # bytes of one table; longer batches take several, one after another
_COLUMNS = 1 << 13  # of a table, that are turned into the weight's gradient at a time
_ALIGNED = 64  # rows: on a GPU an odd leading dimension costs a product its fast kernels


def cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, n_tokens: int, compiled: bool = False
) -> Tensor:
    """Return the sum of the negative log-likelihoods, in nats.

    Args:
        x: What the head sees, (B, T, C).
        weight: The head's matrix, (V, C).
        targets: (B, T) int64, `IGNORED` where none counts.
        n_tokens: Rows that stand for tokens; those after them take no probability and no gradient.
        compiled: Whether a GPU reads the logits in compiled kernels, which is three passes over
            them where eager ones take fourteen.
    """
    apply: Callable[..., Tensor] = _CrossEntropy.apply
    flat = x.flatten(0, 1), weight, targets.flatten()
    return apply(*flat, _products_dtype(x), n_tokens, compiled and x.device.type == "cuda")


@torch.no_grad()
def token_losses(x: Tensor, weight: Tensor, targets: Tensor, n_tokens: int) -> Tensor:
    """Return the negative log-likelihood of each target in nats, (B, T); 0 where none counts.

    Arguments are those of `cross_entropy`; here too there is one table, worked on in pieces.
    """
    rows, aims = x.flatten(0, 1), targets.flatten()
    W = _aligned(weight, _products_dtype(x))
    n_rows = ceil(len(rows) / _n_tables(rows, W))
    losses = [
        _cross_entropy_chunk(_logits(rows[span].to(W.dtype), W, n_tokens), aims[span], learns=False)
        for first in range(0, len(rows), n_rows)
        for span in [slice(first, first + n_rows)]
    ]
    return torch.cat(losses).view(targets.shape)


def _aligned(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the head's matrix in the dtype of products, padded with zeros on a GPU."""
    padding = -len(weight) % _ALIGNED
    if weight.device.type != "cuda" or not padding:
        return weight.to(dtype)
    W = weight.new_zeros(len(weight) + padding, weight.shape[1], dtype=dtype)
    W[: len(weight)] = weight
    return W


def _logits(x: Tensor, W: Tensor, n_tokens: int, room: Tensor | None = None) -> Tensor:
    """Return the logits (N, V); those of padding are masked, for its rows make products faster."""
    table = torch.mm(x, W.T, out=room)
    if n_tokens < len(W):
        table[:, n_tokens:] = -torch.inf
    return table


def _products_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _n_tables(x: Tensor, W: Tensor) -> int:
    """Return how many tables of logits, one after another, rows x (N, C) take."""
    most = _TABLE if x.device.type == "cpu" else 8 * _TABLE  # elsewhere there are no caches to fit
    return ceil(len(x) * len(W) * W.element_size() / most)


class _CrossEntropy(torch.autograd.Function):
    """Forms its gradients with the loss, and scales them when they are asked for."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        n_tokens: int,
        compiled: bool,
    ) -> Tensor:
        learns = any(ctx.needs_input_grad)
        W = _aligned(weight, dtype)
        total = torch.zeros((), device=x.device)
        n_rows = ceil(len(x) / _n_tables(x, W))
        grad_x = torch.empty_like(x) if learns else None  # needed by all that learns below
        # In float32 whatever the weight's dtype: one table's part is small beside the sum's.
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros(W.shape, dtype=torch.float32, device=x.device)
        room = W.new_empty(n_rows, len(W))
        chunk = _compiled_chunk() if compiled and learns else _cross_entropy_chunk
        for first in range(0, len(x), n_rows):
            span = slice(first, first + n_rows)
            rows = x[span].to(dtype)
            # (N, V) logits, then their gradient
            table = _logits(rows, W, n_tokens, room[: len(rows)])
            total += chunk(table, targets[span], learns).sum()
            if grad_x is None:
                continue
            grad_x[span] = table @ W
            if grad_weight is not None:
                _add_product(grad_weight, table, rows)
        ctx.grads = grad_x, grad_weight
        ctx.of_weight = weight.shape[0], weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_x, grad_weight), ctx.grads = ctx.grads, None  # scaled in place, so only once
        if grad_weight is not None:
            n_rows, dtype = ctx.of_weight
            grad_weight = grad_weight.mul_(grads[0])[:n_rows].to(dtype)
        return grad_x.mul_(grads[0]), grad_weight, None, None, None, None


def _add_product(total: Tensor, table: Tensor, rows: Tensor) -> None:
    """Add the product of a table (N, V), turned, and rows (N, C) to a total (V, C) in float32."""
    if table.device.type == "cuda":
        if table.dtype == torch.float32:
            total.addmm_(table.T, rows)
        elif _addmm_adds_to_float32(table.dtype):
            torch.addmm(total, table.T, rows, out_dtype=torch.float32, out=total)
        else:
            total += torch.mm(table.T, rows, out_dtype=torch.float32)
        return
    n_columns = _COLUMNS if table.device.type == "cpu" else len(total)
    for start in range(0, len(total), n_columns):
        columns = slice(start, start + n_columns)
        total[columns] += table[:, columns].T @ rows


@functools.cache
def _addmm_adds_to_float32(dtype: torch.dtype) -> bool:
    """Return whether this torch adds a 16-bit product to a float32 matrix; earlier ones refuse."""
    a = torch.zeros(16, 16, dtype=dtype, device="cuda")
    try:
        torch.addmm(a.float(), a, a, out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True


def _cross_entropy_chunk(table: Tensor, targets: Tensor, learns: bool) -> Tensor:
    """Return the losses (N,) of logits (N, V); with `learns`, put the gradient in their place."""
    losses = []
    on_cpu = table.device.type == "cpu"
    # Elsewhere the question would wait for the device: there rows are masked without asking.
    some_ignored = learns and (not on_cpu or bool((targets == IGNORED).any()))
    n_rows = max(1, _PIECE // table.shape[1]) if on_cpu else len(table)
    for first in range(0, len(table), n_rows):
        logits, aims = table[first : first + n_rows], targets[first : first + n_rows]
        log_p = F.log_softmax(logits, dim=-1, dtype=torch.float32)
        losses.append(F.nll_loss(log_p, aims, ignore_index=IGNORED, reduction="none"))
        if learns:
            p = log_p.exp_()
            p.scatter_add_(
                1, aims.clamp(min=0)[:, None], p.new_full((1, 1), -1.0).expand(len(p), 1)
            )
            if some_ignored:
                p.masked_fill_((aims == IGNORED)[:, None], 0)
            logits.copy_(p)
    return torch.cat(losses)


@functools.cache
def _compiled_chunk() -> Callable[[Tensor, Tensor, bool], Tensor]:
    """Return a compiled `_cross_entropy_chunk` that learns: one reduction, one pointwise kernel."""
    return torch.compile(_fused_chunk, dynamic=False)


def _fused_chunk(table: Tensor, targets: Tensor, learns: bool) -> Tensor:
    """Do what `_cross_entropy_chunk` does where it learns, in operations that a compiler fuses."""
    logits = table.float()
    counts = targets != IGNORED
    aims = targets.clamp(min=0)[:, None]
    log_z = logits.logsumexp(-1, keepdim=True)
    losses = torch.where(counts, (log_z - logits.gather(1, aims))[:, 0], 0.0)
    hit = torch.arange(table.shape[1], device=table.device) == aims
    gradient = (logits - log_z).exp() - hit.float()
    table.copy_(torch.where(counts[:, None], gradient, 0.0))
    return losses
