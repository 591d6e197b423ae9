"""Products of rows and weights, and the activation between two of them, on a CPU that learns.

What torch and autocast would keep for the backward pass, and is quickly made again, is not kept:
weights in bfloat16, and activations. Letters as in gpt.py; K and N, the widths of a weight.
"""

import ctypes
import functools
from ctypes import c_int, c_long, c_void_p
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptcli.model.kernels import SHORTEST, activate, activate_back, can_run, is_fake

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
    if learns and (dtype == torch.bfloat16 or (dtype == x.dtype and _is_ours(x))):
        apply: Any = _Linear.apply
        y: Tensor = apply(x, weight, bias, dtype)
        return y
    return product(x, weight, bias) if dtype == x.dtype else F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        rows = x.to(dtype)
        ctx.save_for_backward(rows if weight.requires_grad else None, weight)
        ctx.of_x = x.dtype
        return _multiply(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (rows, weight), grad, needs = ctx.saved_tensors, grads[0], ctx.needs_input_grad
        return (
            _gradient_of_x(grad, weight).to(ctx.of_x) if needs[0] else None,
            _gradient_of_weight(grad, rows, weight) if needs[1] else None,
            _gradient_of_bias(grad, weight) if needs[2] else None,
            None,
        )


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return product(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _gradient_of_x(grad: Tensor, weight: Tensor) -> Tensor:
    return product(grad, weight.to(grad.dtype).T)


def _gradient_of_weight(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    grad, x = grad.flatten(0, -2), x.flatten(0, -2)
    if grad.dtype != torch.float32:
        return F.linear(grad.T, x.T).to(weight.dtype)
    total = grad.new_empty(weight.shape)
    multiply_into(total, grad.T, x)
    return total.to(weight.dtype)


def _gradient_of_bias(grad: Tensor, weight: Tensor) -> Tensor:
    return grad.flatten(0, -2).sum(0, dtype=torch.float32).to(weight.dtype)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x (..., K) times weight (N, K) transposed, plus a bias (N), all of one dtype."""
    if not _is_ours(x):
        return F.linear(x, weight, bias)
    rows, N = x.flatten(0, -2), weight.shape[0]
    y = x.new_empty(rows.shape[0], N)
    _multiply_into(y, rows, weight.T, bias)
    return y.view(*x.shape[:-1], N)


def multiply_into(y: Tensor, a: Tensor, b: Tensor, adds: bool = False) -> None:
    """Set y (M, N), which lies by rows, to a (M, K) times b (K, N), or add that.

    a and b are of one dtype, and so is y if it is added to.
    """
    if _is_ours(a) and y.dtype == a.dtype:
        _multiply_into(y, a, b, adds=adds)
    elif adds:
        y.addmm_(a, b)
    elif y.dtype == a.dtype:
        torch.mm(a, b, out=y)
    else:
        y.copy_(a @ b)


class _Job(ctypes.Structure):
    _fields_ = [
        ("a", c_void_p), *((name, c_long) for name in ("a_lane", "a_step")),
        ("b", c_void_p), *((name, c_long) for name in ("b_lane", "b_step")),
        *((name, c_void_p) for name in ("bias", "y")),
        *((name, c_long) for name in ("M", "N", "K", "share", "strip", "columns")),
        *((name, c_int) for name in ("adds", "next")),
    ]  # fmt: skip


def _multiply_into(
    y: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None, adds: bool = False
) -> None:
    library = _library()
    assert library is not None and a.dtype == b.dtype == y.dtype and a.shape[1] == b.shape[0]
    # Rows, or columns; of a matrix that is neither, a copy.
    if 1 not in a.stride():
        a = a.contiguous()
    if 1 not in b.stride():
        b = b.contiguous()
    (M, N), (b_step, b_lane) = y.shape, b.stride()
    bias = None if bias is None else bias.contiguous()
    at_bias = None if bias is None else bias.data_ptr()
    job = _Job(a.data_ptr(), *a.stride(), b.data_ptr(), b_lane, b_step, at_bias, y.data_ptr(),
               M, N, a.shape[1], 0, 0, 0, adds, 0)  # fmt: skip
    library.multiply(ctypes.byref(job), torch.get_num_threads())


@functools.cache
def _library() -> ctypes.CDLL | None:
    from gptcli.native import build  # which only training on a CPU needs

    found = build(Path(__file__).with_name("products.c"))
    if found is not None:
        found.multiply.argtypes, found.multiply.restype = [c_void_p, c_int], None
    return found


def _is_ours(x: Tensor) -> bool:
    """Tell whether products.c multiplies by rows x."""
    is_one = x.dtype == torch.float32 and x.numel() >= _FEW * x.shape[-1]
    return is_one and can_run(x) and not is_fake(x) and _mkl_is_slow() and _library() is not None


@functools.cache
def _mkl_is_slow() -> bool:
    """Tell whether torch's products in float32 are: MKL gives other makers' processors old code."""
    from gptcli.settled import processor

    has_vectors = torch.backends.cpu.get_cpu_capability() in ("AVX512", "AVX2")
    return has_vectors and "Intel" not in processor()


def activation(kind: str, x: Tensor, up: Tensor | None) -> Tensor:
    """Return GELU (GPT-2 approximates by tanh, nanoGPT does not), max(x, 0)^2, or up gated by x."""
    if can_activate(x, up):
        return activated_linear(kind, x, up, None, None)
    if up is not None:
        return F.silu(x) * up  # SwiGLU (Shazeer 2020)
    if kind == "relu2":
        return F.relu(x).square()  # So et al. 2021
    return F.gelu(x, approximate="tanh" if kind == "gelu" else "none")


def can_activate(x: Tensor, up: Tensor | None) -> bool:
    """Tell whether `activated_linear` takes x, to learn; without a gradient, torch is as fast."""
    fits = up is None or up.dtype == x.dtype
    return fits and x.requires_grad and x.numel() >= SHORTEST and can_run(x)


def activated_linear(
    kind: str, x: Tensor, up: Tensor | None, weight: Tensor | None, bias: Tensor | None
) -> Tensor:
    """Return `activation` (..., K), times weight (N, K) transposed, plus a bias (N).

    The activation is not kept for the backward pass, which finds it again in a hundredth of the
    time of the products.
    """
    apply: Any = _ActivatedLinear.apply
    y: Tensor = apply(kind, x, up, weight, bias)
    return y


class _ActivatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kind: str,
        x: Tensor,
        up: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        x, up = x.contiguous(), None if up is None else up.contiguous()
        ctx.save_for_backward(x, up, weight)
        ctx.kind = kind
        y = activate(kind, x, up)
        return y if weight is None else _multiply(y, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, up, weight), grad, needs = ctx.saved_tensors, grads[0], ctx.needs_input_grad
        if weight is None:
            of_x = grad.clone(memory_format=torch.contiguous_format)  # which others may read
            return None, of_x, activate_back(ctx.kind, x, up, of_x, None), None, None
        of_x = _gradient_of_x(grad, weight).to(x.dtype)  # of the activation, until the next line
        y = torch.empty_like(x) if needs[3] else None
        of_up = activate_back(ctx.kind, x, up, of_x, y)
        of_weight = None if y is None else _gradient_of_weight(grad, y, weight)
        of_bias = _gradient_of_bias(grad, weight) if needs[4] else None
        return None, of_x, of_up, of_weight, of_bias
