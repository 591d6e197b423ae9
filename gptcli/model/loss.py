"""Chunked linear cross-entropy: the gradient overwrites the logits.

Plain cross-entropy keeps four float32 buffers of N x V: with 50,257 tokens and a batch of 2,048
that is 1.6 GB. Here there is one, in the precision of the matmuls, processed in chunks that stay in
the processor's caches while the logits are there, so no product is computed twice (as in Liger
Kernel, Hsu et al. 2024). Letters as in gpt.py; N = B T.
"""

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


def cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, n_tokens: int) -> Tensor:
    """Return the sum of the negative log-likelihoods, in nats.

    Args:
        x: What the head sees, (B, T, C).
        weight: The head's matrix, (V, C).
        targets: (B, T) int64, `IGNORED` where none counts.
        n_tokens: Rows that stand for tokens; those after them take no probability and no gradient.
    """
    apply: Callable[..., Tensor] = _CrossEntropy.apply
    return apply(x.flatten(0, 1), weight, targets.flatten(), _products_dtype(x), n_tokens)


@torch.no_grad()
def token_losses(x: Tensor, weight: Tensor, targets: Tensor, n_tokens: int) -> Tensor:
    """Return the negative log-likelihood of each target in nats, (B, T); 0 where none counts.

    Arguments are those of `cross_entropy`; here too there is one table, worked on in pieces.
    """
    rows, aims, W = x.flatten(0, 1), targets.flatten(), weight.to(_products_dtype(x))
    n_rows = ceil(len(rows) / _n_tables(rows, W))
    losses = [
        _cross_entropy_chunk(_logits(rows[span].to(W.dtype), W, n_tokens), aims[span], learns=False)
        for first in range(0, len(rows), n_rows)
        for span in [slice(first, first + n_rows)]
    ]
    return torch.cat(losses).view(targets.shape)


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
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, n_tokens: int
    ) -> Tensor:
        learns = any(ctx.needs_input_grad)
        W = weight.to(dtype)
        total = torch.zeros((), device=x.device)
        n_rows = ceil(len(x) / _n_tables(x, W))
        n_columns = _COLUMNS if x.device.type == "cpu" else len(W)
        grad_x = torch.empty_like(x) if learns else None  # needed by all that learns below
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        room = W.new_empty(n_rows, len(W))
        for first in range(0, len(x), n_rows):
            span = slice(first, first + n_rows)
            rows = x[span].to(dtype)
            # (N, V) logits, then their gradient
            table = _logits(rows, W, n_tokens, room[: len(rows)])
            total += _cross_entropy_chunk(table, targets[span], learns).sum()
            if grad_x is None:
                continue
            grad_x[span] = table @ W
            if grad_weight is not None:
                for start in range(0, len(W), n_columns):
                    columns = slice(start, start + n_columns)
                    grad_weight[columns] += table[:, columns].T @ rows
        ctx.grads = grad_x, grad_weight
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        (grad_x, grad_weight), ctx.grads = ctx.grads, None  # scaled in place, so only once
        if grad_weight is not None:
            grad_weight.mul_(grads[0])
        return grad_x.mul_(grads[0]), grad_weight, None, None, None


def _cross_entropy_chunk(table: Tensor, targets: Tensor, learns: bool) -> Tensor:
    """Return the losses (N,) of logits (N, V); with `learns`, put the gradient in their place."""
    losses = []
    some_ignored = learns and bool((targets == IGNORED).any())
    n_rows = max(1, _PIECE // table.shape[1]) if table.device.type == "cpu" else len(table)
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
                p[aims == IGNORED] = 0
            logits.copy_(p)
    return torch.cat(losses)
