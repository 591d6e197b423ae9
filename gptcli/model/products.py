"""Products of rows and weights, and the activation between two of them, on a CPU that learns.

What torch and autocast would keep for the backward pass, and is quickly made again, is not kept:
weights in bfloat16, and activations. Letters as in gpt.py; K and N, the widths of a weight.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from gptcli.model.kernels import SHORTEST, activate, can_run, is_fake

_FEW = 16  # rows of a product below which oneDNN takes longer to start than it saves
_LARGE, _MANY = 1 << 20, 1024  # numbers of a weight and rows, from which copying it pays
_NARROW, _WIDE = 8, 16  # floats of a vector


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
    return _product(x, weight, bias) if dtype == x.dtype else F.linear(x, weight, bias)


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
        of_x, *others = _multiply_back(ctx.needs_input_grad, grads[0], *ctx.saved_tensors)
        return None if of_x is None else of_x.to(ctx.of_x), *others, None


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _product(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _multiply_back(
    needs: tuple[bool, ...], grad: Tensor, x: Tensor | None, weight: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, the weight and the bias that are needed."""
    rows, of_x, of_weight, of_bias = grad.flatten(0, -2), None, None, None
    if x is not None:
        turned = rows.T, x.flatten(0, -2).T
        product = F.linear if _lanes_of_onednn() == _NARROW else _product
        of_weight = product(*turned).to(weight.dtype)
    if needs[0]:
        of_x = _product(grad, _rows_of(weight.to(grad.dtype).T, grad))
    if needs[2]:
        of_bias = rows.sum(0, dtype=torch.float32).to(weight.dtype)
    return of_x, of_weight, of_bias


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if _is_slow(x.dtype, x) and not is_fake(x):
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y
    return F.linear(x, weight, bias)


def _rows_of(turned: Tensor, x: Tensor) -> Tensor:
    """Return a large transposed weight by rows, which oneDNN reads faster for many rows x."""
    pays = turned.numel() > _LARGE and x.numel() >= _MANY * x.shape[-1]
    return turned.contiguous() if pays and _is_slow(x.dtype, x) else turned


def _is_slow(dtype: torch.dtype, x: Tensor) -> bool:
    """Tell whether torch takes longer for a product with rows x than `_product`."""
    is_one = dtype == x.dtype == torch.float32 and x.numel() >= _FEW * x.shape[-1]
    return is_one and _lanes_of_onednn() > 0


@functools.cache
def _lanes_of_onednn() -> int:
    """Return how wide the vectors are by which oneDNN is faster in float32 than torch's MKL, or 0.

    MKL gives other makers' processors its code of 256 bits, whatever they have: less than half the
    speed of oneDNN's where that has 512, and 0.87 of it where it has 256 too, but for the gradients
    of weights.
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
        y = activate(kind, x, up)[0]
        return y if weight is None else _multiply(y, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, up, weight = ctx.saved_tensors
        if weight is None:
            return None, *activate(ctx.kind, x, up, grads[0].contiguous()), None, None
        y = activate(ctx.kind, x, up)[0] if weight.requires_grad else None
        needs = True, *ctx.needs_input_grad[3:]
        of_y, *others = _multiply_back(needs, grads[0], y, weight)
        assert of_y is not None
        return None, *activate(ctx.kind, x, up, of_y.to(x.dtype).contiguous()), *others
