"""Weights for decoding: in few bits, multiplied by the kernel that is fastest on this machine.

A token needs every weight once, so decoding takes as long as reading them. Which of torch's kernels
reads fastest differs from processor to processor by a factor of three (float16 saturates the memory
of one and loses to float32 on another), so they are timed on the model's own matrices, which takes
about a tenth of a second. Residuals and norms stay float32.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcli.errors import ConfigError
from gptcli.model import GPT

# Parameters from which a token's time is that of reading weights: below, fewer bits gain nothing.
LARGE = 20_000_000
_TIMED = 4  # matrices, so that none is in the cache when its turn comes
_LAPS = 3
_MARGIN = 1.25  # a kernel wins by this factor, so that noise does not decide a close race

_INT8_WIDTH = 16  # torch._weight_int8pack_mm takes multiples of it, and does not check

MatmulFn = Callable[[Tensor], Tensor]  # (..., K) to (..., N)


class Kernel(NamedTuple):
    """A way to multiply by a matrix: from a weight (N, K) and a bias (N,) or None to a product.

    The dtype is that of the product's input and output.
    """

    name: str
    dtype: torch.dtype
    prepare: Callable[[Tensor, Tensor | None], MatmulFn]


@torch.no_grad()
def prepare_for_decoding(
    model: GPT, dtype: torch.dtype | None = None, *, rows: int = 1, int8: bool = False
) -> str:
    """Replace the weights of `model` by those it decodes best with; it cannot be trained then.

    Args:
        model: In evaluation mode, float32.
        dtype: None on a CPU is what is fastest: 16 bits or, for a small model, float32.
        rows: Texts that are decoded together.
        int8: Quantize the blocks' matrices, with a scale for each row (N); the head, where an
            error is an error of a logit, keeps 16 bits.

    Returns:
        The names of the kernels chosen.
    """
    linears = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    head = {"lm_head": linears.pop("lm_head")}
    if (device := model.wte.weight.device.type) != "cpu":
        if int8:
            raise ConfigError(
                f"--quantize int8: it is slower than 16 bits on {device}", "leave --quantize out"
            )
        model.to(dtype)  # all of it: there, what lies between the products has this precision too
        return f"{_name(model.wte.weight.dtype)} weights"
    if int8:
        chosen = _replace(model, linears, _int8_candidates(linears), rows)
        head_dtype = None if dtype == torch.float32 else dtype
        return f"{chosen.name}, head {_replace(model, head, _candidates(head_dtype), rows).name}"
    if dtype in (None, torch.float32) and model.n_params() < LARGE:
        return "float32"
    chosen = _replace(model, linears, _candidates(dtype), rows)
    # With many rows another kernel may suit the head, which is wider than all others.
    _replace(model, head, [chosen] if rows == 1 else _candidates(chosen.dtype), rows)
    return f"{_name(chosen.dtype)} weights"


def _replace(
    model: GPT, layers: dict[str, nn.Linear], candidates: list[Kernel], rows: int
) -> Kernel:
    kernel = _autotune(candidates, list(layers.values()), rows, model.wte.weight)
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        module = model.get_submodule(parent)
        delattr(module, last)  # a function takes the module's place: calling it costs less
        setattr(module, last, kernel.prepare(layer.weight, layer.bias))
    return kernel


def _autotune(
    candidates: list[Kernel], layers: list[nn.Linear], rows: int, other: Tensor
) -> Kernel:
    """Time kernels on the largest matrices, and return the fastest that is right."""
    if len(candidates) == 1:
        return candidates[0]
    largest = max(layers, key=lambda layer: layer.weight.numel()).weight.shape
    timed = [layer for layer in layers if layer.weight.shape == largest][:_TIMED]
    x = torch.linspace(-1, 1, rows * timed[0].in_features).view(rows, 1, -1)
    expected = F.linear(x, timed[0].weight.float())
    best, best_seconds = candidates[0], float("inf")
    for kernel in candidates:
        try:
            products = [kernel.prepare(layer.weight, None) for layer in timed]
            error = (products[0](x) - expected).norm() / expected.norm()
        except (RuntimeError, AttributeError, NotImplementedError):
            continue  # this torch or this processor does not have it
        if not error < 0.05:
            continue
        seconds = min(_time(products, x, other) for _ in range(_LAPS))
        if seconds * _MARGIN < best_seconds:
            best, best_seconds = kernel, seconds
    return best


def _time(products: list[MatmulFn], x: Tensor, other: Tensor) -> float:
    # Read a large tensor first: between two uses of a weight in decoding all others are read, and a
    # kernel that is fast out of the cache may be slow out of the memory.
    other.sum()
    began = time.perf_counter()
    for product in products:
        product(x)
    return time.perf_counter() - began


def _candidates(dtype: torch.dtype | None) -> list[Kernel]:
    """Return the kernels for weights of `dtype` on a CPU, the most exact and steady first."""
    if dtype is None:  # float16 first: it rounds 8 times finer, and weights are small numbers
        return [*_candidates(torch.float16), *_candidates(torch.bfloat16)]
    plain = Kernel(_name(dtype), dtype, partial(_plain, dtype))
    packed = Kernel(f"{_name(dtype)} packed", dtype, partial(_packed, dtype))
    return [packed, plain] if dtype == torch.bfloat16 else [plain, packed]


def _int8_candidates(layers: dict[str, nn.Linear]) -> list[Kernel]:
    """Return the kernels for int8 weights; torch's own reads past rows of other widths."""
    fits = all(layer.in_features % _INT8_WIDTH == 0 for layer in layers.values())
    return [INT8, INT8_PLAIN] if fits else [INT8_PLAIN]


def _plain(dtype: torch.dtype, weight: Tensor, bias: Tensor | None) -> MatmulFn:
    W, b = weight.to(dtype), None if bias is None else bias.to(dtype)
    if dtype == torch.float16:  # whose range is narrow: what leaves a product may be large
        return lambda x: F.linear(x.to(dtype), W, b).float()
    return lambda x: F.linear(x.to(dtype), W, b)


def _packed(dtype: torch.dtype, weight: Tensor, bias: Tensor | None) -> MatmulFn:
    """Order the weight as oneDNN wants it (as torch's own compiler does), once."""
    W, b = weight.to(dtype), None if bias is None else bias.to(dtype)
    W = torch.ops.mkldnn._reorder_linear_weight(W, 1)

    def product(x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x.to(dtype), W, b, "none", [], "")
        return y.float() if dtype == torch.float16 else y

    return product


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 weights (N, K) and their scales (N,): symmetric, the largest of a row is 127."""
    scales = (weight.abs().amax(dim=1) / 127).clamp(min=1e-12).bfloat16()  # as they will be used
    rounded = (weight / scales.float()[:, None]).round().clamp(-127, 127)
    return rounded.to(torch.int8), scales


def _int8(weight: Tensor, bias: Tensor | None) -> MatmulFn:
    (W, scales), b = quantize(weight.float()), None if bias is None else bias.bfloat16()

    def product(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        y = torch._weight_int8pack_mm(rows, W, scales).view(*x.shape[:-1], -1)
        return y if b is None else y + b

    return product


def _int8_plain(weight: Tensor, bias: Tensor | None) -> MatmulFn:
    W, scales = quantize(weight.float())

    def product(x: Tensor) -> Tensor:
        y = F.linear(x, W.to(x.dtype)) * scales.to(x.dtype)
        return y if bias is None else y + bias

    return product


INT8 = Kernel("int8 weights", torch.bfloat16, _int8)
INT8_PLAIN = Kernel("int8 weights, widened", torch.float32, _int8_plain)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
