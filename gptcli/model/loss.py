"""Chunked linear cross-entropy: the gradient overwrites the logits.

Plain cross-entropy keeps four float32 buffers of N x V: with 50,257 tokens and a batch of 2,048
that is 1.6 GB. Here there is one, in the precision of the matmuls, processed in chunks that stay in
the processor's caches while the logits are there, so no product is computed twice (as in Liger
Kernel, Hsu et al. 2024). Letters as in gpt.py; N = B T.
"""

import functools
from collections.abc import Callable, Iterator
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptcli.model import kernels
from gptcli.model.products import can_multiply, multiply_into, products_dtype

IGNORED = -100  # a target that does not count, as in torch's cross entropy
_PIECE = 1 << 20  # numbers at a time, on a CPU
_TABLE = 1 << 25  # numbers of one table of logits; longer batches take several, one after another
_MOST = 1 << 29  # bytes of it where there are no caches to fit
_COLUMNS = 1 << 13  # of a table, that are turned into the weight's gradient at a time
_ALIGNED = 64  # rows: on a GPU an odd leading dimension costs a product its fast kernels
_PLAIN = ("cpu", "mps")  # devices without these kernels


def cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, n_tokens: int, compiled: bool = False
) -> Tensor:
    """Return the sum of the negative log-likelihoods, in nats.

    Args:
        x: Input of the head, (B, T, C).
        weight: The head's matrix, (V, C).
        targets: (B, T) int64, `IGNORED` where none counts.
        n_tokens: Rows that are tokens; those after them take no probability and no gradient.
        compiled: Whether a GPU reads the logits in compiled kernels, which is three passes over
            them where eager ones take fourteen.
    """
    apply: Callable[..., Tensor] = _CrossEntropy.apply
    flat = x.flatten(0, 1), weight, targets.flatten()
    return apply(*flat, products_dtype(x), n_tokens, compiled and x.device.type == "cuda")


@torch.no_grad()
def token_losses(x: Tensor, weight: Tensor, targets: Tensor, n_tokens: int) -> Tensor:
    """Return the negative log-likelihood of each target in nats, (B, T); 0 where none counts.

    Arguments are those of `cross_entropy`.
    """
    flat, x = targets.flatten(), x.flatten(0, 1).to(products_dtype(x))
    W = _aligned(weight, x)
    losses = torch.zeros(flat.shape, device=x.device)
    counted = _counted(flat)
    aims = flat[counted]
    parts = [
        _losses(logits, aims[span], needs_grad=False)
        for span, _, logits in _chunks(x[counted], W, n_tokens)
    ]
    losses[counted] = torch.cat(parts) if parts else losses[:0]
    return losses.view(targets.shape)


def _counted(targets: Tensor) -> Tensor | slice:
    """Return which targets (N,) count; a GPU is not asked, for the answer would be waited for."""
    if targets.device.type != "cpu" or not bool((targets == IGNORED).any()):
        return slice(None)
    return (targets != IGNORED).nonzero()[:, 0]


def _aligned(weight: Tensor, x: Tensor) -> Tensor:
    """Return the head's matrix as products with x take it, padded with zeros on a GPU."""
    padding = -len(weight) % _ALIGNED
    if can_multiply(x) and weight.dtype == torch.float32:  # which is rounded as it is read
        return weight
    if weight.device.type in _PLAIN or not padding:
        return weight.to(x.dtype)
    W = weight.new_zeros(len(weight) + padding, weight.shape[1], dtype=x.dtype)
    W[: len(weight)] = weight
    return W


def _chunks(x: Tensor, W: Tensor, n_tokens: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield which rows of x (N, C), these rows, and their logits (N, V), there until the next."""
    if not len(x):
        return
    most = buffer_bytes(x.device.type, x.element_size())
    n_rows = ceil(len(x) / ceil(len(x) * len(W) * x.element_size() / most))
    buffer = x.new_empty(n_rows, len(W))
    for first in range(0, len(x), n_rows):
        span = slice(first, first + n_rows)
        rows = x[span]
        logits = buffer[: len(rows)]
        multiply_into(logits, rows, W.T)
        if n_tokens < len(W):  # padding is there because its rows make products faster
            logits[:, n_tokens:] = -torch.inf
        yield span, rows, logits


def buffer_bytes(device: str, itemsize: int) -> int:
    """Return the most bytes of logits at a time on a kind of device."""
    return _TABLE * itemsize if device == "cpu" else _MOST


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
        needs_grad = any(ctx.needs_input_grad)
        # Products are with the rows whose targets count; the others have no gradient.
        counted, n_rows = _counted(targets), len(x)
        of_x, x, targets = x.dtype, x[counted].to(dtype), targets[counted]
        W = _aligned(weight, x)
        # That of x is needed whatever learns, for all else that learns is below the head.
        grad_x = x.new_empty(x.shape, dtype=of_x) if needs_grad else None
        # In float32 whatever the weight's dtype: one chunk's part is small beside the sum's.
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = W.new_empty(W.shape, dtype=torch.float32)
        total = torch.zeros((), device=x.device)
        losses_of = _compiled_losses() if compiled and needs_grad else _losses
        for span, rows, logits in _chunks(x, W, n_tokens):
            total += losses_of(logits, targets[span], needs_grad).sum()
            if grad_x is None:
                continue
            grad = logits  # (N, V), which `_losses` has overwritten
            multiply_into(grad_x[span], grad, W)
            if grad_weight is not None:
                _add_product(grad_weight, grad, rows, is_first=span.start == 0)
        if grad_weight is not None and not len(x):
            grad_weight.zero_()  # no target counts
        if grad_x is not None and len(x) < n_rows:
            every_row = grad_x.new_zeros(n_rows, x.shape[1])
            every_row[counted] = grad_x
            grad_x = every_row
        ctx.grads = grad_x, grad_weight
        ctx.of_weight = weight.shape[0], weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_x, grad_weight), ctx.grads = ctx.grads, None  # scaled in place, so only once
        if grad_weight is not None:
            n_rows, dtype = ctx.of_weight
            grad_weight = grad_weight.mul_(grads[0]).to(dtype)
            if len(grad_weight) > n_rows:  # a view of all would keep autograd from adding in place
                grad_weight = grad_weight[:n_rows]
        return grad_x.mul_(grads[0]), grad_weight, None, None, None, None


def _add_product(total: Tensor, grad: Tensor, rows: Tensor, is_first: bool) -> None:
    """Add grad^T (V, N) times rows (N, C) to a total (V, C) in float32, which the first fills."""
    if grad.dtype == torch.float32 or can_multiply(grad.T):
        multiply_into(total, grad.T, rows, adds=not is_first)
        return
    on_cpu = grad.device.type == "cpu"
    if is_first and not on_cpu:
        total.zero_()
    if grad.device.type not in _PLAIN:
        if _addmm_adds_to_float32(grad.dtype, grad.device):
            torch.addmm(total, grad.T, rows, out_dtype=torch.float32, out=total)
        else:
            total += torch.mm(grad.T, rows, out_dtype=torch.float32)
        return
    n_columns = _COLUMNS if on_cpu else len(total)
    for start in range(0, len(total), n_columns):
        columns = slice(start, start + n_columns)
        part = grad[:, columns].T @ rows
        if is_first and on_cpu:  # a large total would else be passed once more
            total[columns] = part
        else:
            total[columns] += part


@functools.cache
def _addmm_adds_to_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether this torch adds a 16-bit product to a float32 matrix; earlier ones refuse."""
    a = torch.zeros(16, 16, dtype=dtype, device=device)
    try:
        torch.addmm(a.float(), a, a, out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True


def _losses(logits: Tensor, targets: Tensor, needs_grad: bool) -> Tensor:
    """Return the losses (N,) of logits (N, V); with `needs_grad`, overwrite these by the gradient.

    It is softmax(logits) minus one at the target, and zero where the target does not count.
    """
    targets = targets.contiguous()
    where = 0 if kernels.is_fake(logits) else targets.data_ptr()
    if (found := kernels.losses(logits, where, needs_grad)) is not None:
        return found
    losses = []
    on_cpu = logits.device.type == "cpu"
    # Elsewhere the question would wait for the device: there rows are masked without asking.
    some_ignored = needs_grad and (not on_cpu or bool((targets == IGNORED).any()))
    n_rows = max(1, _PIECE // logits.shape[1]) if on_cpu else len(logits)
    for first in range(0, len(logits), n_rows):
        piece, aims = logits[first : first + n_rows], targets[first : first + n_rows]
        log_p = F.log_softmax(piece, dim=-1, dtype=torch.float32)
        losses.append(F.nll_loss(log_p, aims, ignore_index=IGNORED, reduction="none"))
        if needs_grad:
            p = log_p.exp_()
            minus_one = p.new_full((1, 1), -1.0).expand(len(p), 1)
            p.scatter_add_(1, aims.clamp(min=0)[:, None], minus_one)
            if some_ignored:
                p.masked_fill_((aims == IGNORED)[:, None], 0)
            piece.copy_(p)
    return torch.cat(losses)


@functools.cache
def _compiled_losses() -> Callable[[Tensor, Tensor, bool], Tensor]:
    return torch.compile(_fused_losses, dynamic=False)


def _fused_losses(logits: Tensor, targets: Tensor, needs_grad: bool) -> Tensor:
    """Do what `_losses` does with gradients, in what a compiler fuses: a reduction, a pointwise."""
    table = logits.float()
    counts = targets != IGNORED
    aims = targets.clamp(min=0)[:, None]
    log_z = table.logsumexp(-1, keepdim=True)
    losses = torch.where(counts, (log_z - table.gather(1, aims))[:, 0], 0.0)
    hit = torch.arange(table.shape[1], device=table.device) == aims
    grad = (table - log_z).exp() - hit.float()
    logits.copy_(torch.where(counts[:, None], grad, 0.0))
    return losses
