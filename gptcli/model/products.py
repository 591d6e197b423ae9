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

from gptcli.model.kernels import SHORTEST, activate, activate_back, can_run, is_fake, pointers

_FEW = 16  # rows of a product below which oneDNN takes longer to start than it saves
_NARROW, _WIDE = 8, 16  # floats of a vector
_LARGE, _MANY = 1 << 20, 1024  # numbers of a weight and rows, from which copying it pays


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
    if learns and (dtype == torch.bfloat16 or _is_slow(dtype, x)):
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
    return product(grad, _rows_of(weight.to(grad.dtype).T, grad))


def _gradient_of_weight(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    grad, x = grad.flatten(0, -2), x.flatten(0, -2)
    if grad.dtype != torch.float32:
        return F.linear(grad.T, x.T).to(weight.dtype)
    total = grad.new_empty(weight.shape)
    add_turned_product(total, grad, x, adds=False)
    return total.to(weight.dtype)


def _gradient_of_bias(grad: Tensor, weight: Tensor) -> Tensor:
    return grad.flatten(0, -2).sum(0, dtype=torch.float32).to(weight.dtype)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x (..., K) times weight (N, K) transposed, plus a bias (N), all of one dtype."""
    if _is_slow(x.dtype, x) and not is_fake(x):
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y
    return F.linear(x, weight, bias)


class _Job(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("a", "b", "y")),
        *((name, c_long) for name in ("R", "N", "K", "strip")),
        *((name, c_int) for name in ("adds", "next")),
    ]


def add_turned_product(total: Tensor, a: Tensor, b: Tensor, adds: bool) -> None:
    """Set a total (N, K) to a (R, N) transposed times b (R, K), or add that; all are float32.

    The total lies by rows.
    """
    library = _library() if can_run(a) and _is_slow(a.dtype, a) and not is_fake(a) else None
    if library is None:
        total.addmm_(a.T, b, beta=int(adds))
        return
    a, b = a.contiguous(), b.contiguous()
    job = _Job(**pointers({"a": a, "b": b, "y": total}), R=len(a), N=a.shape[1], K=b.shape[1],
               adds=adds)  # fmt: skip
    library.multiply_turned(ctypes.byref(job), torch.get_num_threads())


@functools.cache
def _library() -> ctypes.CDLL | None:
    from gptcli.native import build  # which only training on a CPU needs

    found = build(Path(__file__).with_name("products.c"))
    if found is not None:
        found.multiply_turned.argtypes, found.multiply_turned.restype = [c_void_p, c_int], None
    return found


def _rows_of(turned: Tensor, x: Tensor) -> Tensor:
    """Return a large transposed weight by rows, which oneDNN reads faster for many rows x."""
    pays = turned.numel() > _LARGE and x.numel() >= _MANY * x.shape[-1]
    return turned.contiguous() if pays and _is_slow(x.dtype, x) else turned


def _is_slow(dtype: torch.dtype, x: Tensor) -> bool:
    """Tell whether torch takes longer for a product with rows x than `product`."""
    is_one = dtype == x.dtype == torch.float32 and x.numel() >= _FEW * x.shape[-1]
    return is_one and _lanes_of_onednn() > 0


def is_wide(weight: Tensor) -> bool:
    """Tell whether `product` is faster for a weight of any shape, not for those of blocks alone."""
    return can_run(weight) and weight.dtype == torch.float32 and _lanes_of_onednn() == _WIDE


@functools.cache
def _lanes_of_onednn() -> int:
    """Return how wide the vectors are by which oneDNN is faster in float32 than torch's MKL, or 0.

    MKL gives other makers' processors its code of 256 bits, whatever they have: less than half the
    speed of oneDNN's where that has 512, and 0.87 of it where it has 256 too, but for the head.
    """
    from gptcli.settled import isa_limit, processor  # which only a CPU needs

    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or "Intel" in processor():
        return 0
    lanes = {"AVX512": _WIDE, "AVX2": _NARROW}.get(torch.backends.cpu.get_cpu_capability(), 0)
    return min(lanes, _NARROW) if isa_limit() == "AVX2" else lanes


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
