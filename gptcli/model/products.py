"""Products of rows and weights, and the activation between two of them, on a CPU that learns.

What torch and autocast would keep for the backward pass, and is quickly made again, is not kept:
weights in bfloat16, and activations. Letters as in gpt.py; K and N, the widths of a weight.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gptcli.model.kernels import SHORTEST, activate, activate_back, at, call, can_run, is_fake

_FEW = 16  # rows of a product below which copying the weight takes longer than it saves


def products_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matrix products with x here."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x (..., K) times weight (N, K) transposed, plus a bias (N).

    Autocast keeps its copy of the weight for the backward pass; in learning on a CPU, it is made
    again.
    """
    if not can_run(x):
        return F.linear(x, weight, bias)
    dtype, factors = products_dtype(x), [t for t in (x, weight, bias) if t is not None]
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in factors)
    if learns and (dtype == torch.bfloat16 or (dtype == x.dtype and can_multiply(x))):
        apply: Any = _Linear.apply
        y: Tensor = apply(x, weight, bias, dtype)
        return y
    return multiply_layer(x, weight, bias) if dtype == x.dtype else F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        rows = x.to(dtype)
        ctx.save_for_backward(rows if weight.requires_grad else None, weight)
        ctx.of_x = x.dtype
        return multiply_layer(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (rows, weight), grad, needs = ctx.saved_tensors, grads[0], ctx.needs_input_grad
        of_x = gradient_of_x(grad, weight, ctx.of_x) if needs[0] else None
        return of_x, *gradients_of_layer(grad, rows, weight, needs[1:3]), None


def multiply_layer(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x (..., K) times weight (N, K) transposed, plus a bias (N), in the dtype of x."""
    if can_multiply(x):
        y = x.new_empty(*x.shape[:-1], len(weight))
        _multiply_into(y, x, weight, bias, by_columns=(False, False))
        return y
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def gradient_of_x(grad: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the gradient of x (..., K), of a dtype, from that of `multiply_layer` (..., N)."""
    if can_multiply(grad):
        found = dtype if dtype == grad.dtype else torch.float32
        y = grad.new_empty(*grad.shape[:-1], weight.shape[1], dtype=found)
        _multiply_into(y, grad, weight)
        return y.to(dtype)
    return F.linear(grad, weight.to(grad.dtype).T).to(dtype)


def gradients_of_layer(
    grad: Tensor, x: Tensor | None, weight: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of the weight (N, K) and of the bias (N), where needed.

    x is needed for that of the weight alone.
    """
    of_bias = grad.flatten(0, -2).sum(0, dtype=torch.float32).to(weight.dtype) if needs[1] else None
    if not needs[0]:
        return None, of_bias
    assert x is not None
    if can_multiply(grad):
        total = grad.new_empty(weight.shape, dtype=torch.float32)
        _multiply_into(total, grad, x, by_columns=(True, True))
        return total.to(weight.dtype), of_bias
    return F.linear(grad.flatten(0, -2).T, x.flatten(0, -2).T).to(weight.dtype), of_bias


def multiply_into(y: Tensor, a: Tensor, b: Tensor, adds: bool = False) -> None:
    """Set y (M, N), which lies by rows, to a (M, K) times b (K, N), or add that.

    b is rounded to the dtype of a. y is of that dtype too if it is added to, or, where
    `can_multiply` takes a, of float32.
    """
    rounds = y.dtype != torch.float32
    if can_multiply(a) and not (rounds and (adds or y.dtype != a.dtype)):
        _multiply_into(y, a, b, adds=adds)
        return
    b = b.to(a.dtype)
    if adds:
        y.addmm_(a, b)
    elif y.dtype == a.dtype:
        torch.mm(a, b, out=y)
    else:
        y.copy_(a @ b)


_JOB = "P3q P3q 2P 4q 24x i 4x"  # of products.c; what it fills in itself is zero


def _multiply_into(
    y: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    adds: bool = False,
    by_columns: tuple[bool, bool] = (False, True),
) -> None:
    """Set y (..., N), which lies by rows, to a product plus a bias (N), or add it.

    Its numbers are sums over a row of a and a row of b; `by_columns` says of which of the two it is
    a column. Rows may be (..., K); dtypes as in `multiply_into`.
    """
    library = _library(a.dtype)
    assert library is not None and y.is_contiguous() and y.dtype in (a.dtype, torch.float32)
    if not y.numel():
        return
    if b.dtype != torch.float32:  # which is rounded on the way
        b = b.to(a.dtype)
    a, M, *a_fields = _factor(a, by_columns[0])
    b, N, *b_fields = _factor(b, by_columns[1])
    K = a.numel() // M
    assert b.numel() == N * K and y.numel() == M * N
    bias = None if bias is None else bias.float().contiguous()
    call(library.multiply, _JOB, *a_fields, *b_fields, *at(bias, y), M, N, K,
         y.element_size(), adds)  # fmt: skip


def _factor(x: Tensor, by_columns: bool) -> tuple[Tensor, int, int, int, int, int]:
    """Return x, how many rows or columns it has, and what products.c takes to read them.

    What lies neither by rows nor by columns is copied. A dimension of size 1 may have any stride:
    those of more than two dimensions are not asked for.
    """
    if x.dim() > 2 or 1 not in x.stride():
        x = x.contiguous()
    width = x.shape[-1]
    row, number = x.stride() if x.dim() == 2 else (width, 1)
    if by_columns:
        return x, width, x.data_ptr(), number, row, x.element_size()
    return x, x.numel() // width, x.data_ptr(), row, number, x.element_size()


@functools.cache
def _library(dtype: torch.dtype) -> ctypes.CDLL | None:
    from gptcli.native import build  # which only training on a CPU needs

    options = ("-DHALF",) if dtype == torch.bfloat16 else ()
    found = build(Path(__file__).with_name("products.c"), options=options)
    return found if found is not None and found.can_multiply() else None


def can_multiply(x: Tensor) -> bool:
    """Tell whether products.c multiplies by rows x, on a CPU."""
    is_fit = can_run(x) and x.numel() >= _FEW * max(1, x.shape[-1])
    return is_fit and not is_fake(x) and _others_are_slow() and _library(x.dtype) is not None


@functools.cache
def _others_are_slow() -> bool:
    """Tell whether torch's products are, by the processor's maker and its vectors.

    MKL gives other makers' processors old code; in bfloat16, oneDNN wants copies of weights.
    """
    from gptcli.settled import processor

    has_vectors = torch.backends.cpu.get_cpu_capability() in ("AVX512", "AVX2")
    return has_vectors and "Intel" not in processor()


def activation(kind: str, x: Tensor, up: Tensor | None) -> Tensor:
    """Return GELU (GPT-2 approximates by tanh, nanoGPT does not), max(x, 0)^2, or up gated by x."""
    fits = up is None or up.dtype == x.dtype
    if fits and x.requires_grad and x.numel() >= SHORTEST and can_run(x):
        apply: Any = _Activation.apply
        y: Tensor = apply(kind, x, up)
        return y
    if up is not None:
        return F.silu(x) * up  # SwiGLU (Shazeer 2020)
    if kind == "relu2":
        return F.relu(x).square()  # So et al. 2021
    return F.gelu(x, approximate="tanh" if kind == "gelu" else "none")


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kind: str, x: Tensor, up: Tensor | None) -> Tensor:
        x, up = x.contiguous(), None if up is None else up.contiguous()
        ctx.save_for_backward(x, up)
        ctx.kind = kind
        return activate(kind, x, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, up = ctx.saved_tensors
        of_x = grads[0].clone(memory_format=torch.contiguous_format)  # which others may read
        return None, of_x, activate_back(ctx.kind, x, up, of_x, None)


def can_learn(x: Tensor) -> bool:
    """Tell whether x (..., C) learns on a CPU, with products in float32 or bfloat16."""
    is_fit = x.requires_grad and torch.is_grad_enabled() and can_run(x)
    return is_fit and products_dtype(x) in (x.dtype, torch.bfloat16)


def can_activate(x: Tensor, width: int) -> bool:
    """Tell whether `mlp` takes x (..., C), for an activation so wide."""
    return can_learn(x) and x.numel() // x.shape[-1] * width >= SHORTEST


def mlp(kind: str, x: Tensor, fc: nn.Linear, gate: nn.Linear | None, proj: nn.Linear) -> Tensor:
    """Return `proj` of the activation of `fc`, or of `fc` gated by `gate`, of x (..., C).

    One step of the backward pass, for each step costs time, and the activation is not kept:
    it is found again in a hundredth of the time of the products.
    """
    of_gate = (None, None) if gate is None else (gate.weight, gate.bias)
    apply: Any = _MLP.apply
    y: Tensor = apply(kind, products_dtype(x), x, fc.weight, fc.bias, *of_gate, proj.weight,
                      proj.bias)  # fmt: skip
    return y


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kind: str, dtype: torch.dtype, x: Tensor, *layers: Tensor | None
    ) -> Tensor:
        fc, fc_bias, gate, gate_bias, proj, proj_bias = layers
        assert fc is not None and proj is not None
        rows, up = x.to(dtype), None
        h = multiply_layer(rows, fc, fc_bias)
        if gate is not None:
            h, up = multiply_layer(rows, gate, gate_bias), h
        learns = fc.requires_grad or (gate is not None and gate.requires_grad)
        ctx.save_for_backward(rows if learns else None, h, up, fc, gate, proj)
        ctx.kind, ctx.of_x = kind, x.dtype
        return multiply_layer(activate(kind, h, up), proj, proj_bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (rows, h, up, fc, gate, proj), needs = ctx.saved_tensors, ctx.needs_input_grad[3:]
        of_h = gradient_of_x(grads[0], proj, h.dtype)  # of the activation, until two lines below
        y = torch.empty_like(h) if needs[4] else None
        of_up = activate_back(ctx.kind, h, up, of_h, y)
        of_proj = gradients_of_layer(grads[0], y, proj, needs[4:])
        del y  # before there are others
        of_fc = of_h if of_up is None else of_up
        of_x = gradient_of_x(of_fc, fc, ctx.of_x)
        of_gate: tuple[Tensor | None, Tensor | None] = None, None
        if gate is not None:
            of_x += gradient_of_x(of_h, gate, ctx.of_x)
            of_gate = gradients_of_layer(of_h, rows, gate, needs[2:4])
        of_both = gradients_of_layer(of_fc, rows, fc, needs[:2])
        return None, None, of_x, *of_both, *of_gate, *of_proj
