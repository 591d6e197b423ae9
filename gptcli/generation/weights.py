"""Weights for decoding: in few bits, multiplied by the kernel that is fastest on this machine.

A token needs every weight once, so decoding takes as long as reading them. torch's kernels reach
the speed of the memory on some processors and for some precisions only, so few rows are multiplied
by matvec.c where there is a compiler. It and torch's own are timed on the model's own matrices,
once per machine. Residuals and norms stay float32.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcli.errors import ConfigError
from gptcli.generation import native
from gptcli.generation.product import Product, quantize, widened
from gptcli.generation.step import step_in_one_call
from gptcli.model import GPT
from gptcli.settled import settled

# Parameters from which a token's time is that of reading weights: below, fewer bits gain nothing.
LARGE = 20_000_000
_TIMED = 4  # matrices, so that none is in the cache when its turn comes
_LAPS = 3
_MARGIN = 1.25  # a kernel wins by this factor, so that noise does not decide a close race

_WIDTH = 64  # matvec.c takes multiples of it
_INT8_WIDTH = 16  # torch._weight_int8pack_mm takes multiples of it, and does not check

MatmulFn = Callable[[Tensor], Tensor]  # (..., K) to (..., N)


class Kernel(NamedTuple):
    """A way to multiply by a matrix: from a weight (N, K) and a bias (N,) or None to a product."""

    name: str
    prepare: Callable[[Tensor, Tensor | None], MatmulFn]


@torch.no_grad()
def prepare_for_decoding(
    model: GPT,
    dtype: torch.dtype | None = None,
    *,
    rows: int = 1,
    int8: bool = False,
    retune: bool = False,
) -> str:
    """Replace the weights of `model` by those it decodes best with; it cannot be trained then.

    Args:
        model: In evaluation mode, float32.
        dtype: None on a CPU is what is fastest: 16 bits or, for a small model, float32.
        rows: Texts that are decoded together.
        int8: Quantize the matrices, the head too, with a scale for every 32 weights of a row.
        retune: Time the kernels even if this machine has done so before.

    Returns:
        The name of the kernel chosen.
    """
    device = model.wte.weight.device.type
    is_small = not int8 and dtype in (None, torch.float32) and model.n_params() < LARGE
    if retune and (device != "cpu" or is_small):
        raise ConfigError("--retune: this model has no kernels to time here", "leave --retune out")
    if device != "cpu":
        if int8:
            raise ConfigError(
                f"--quantize int8: it is slower than 16 bits on {device}", "leave --quantize out"
            )
        model.to(dtype)  # all of it: there, what lies between the products has this precision too
        return f"{_name(model.wte.weight.dtype)} weights"
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    if is_small:  # ours gives a text the same sums alone and among others
        kernel = _candidates(torch.float32, list(layers.values()))[0]
        if kernel.name != "float32":
            return "float32"
    else:
        kernel = _choose(model, list(layers.values()), torch.int8 if int8 else dtype, rows, retune)
    for name, layer in layers.items():
        parent, _, last = name.rpartition(".")
        module = model.get_submodule(parent)
        delattr(module, last)  # a function takes the module's place: calling it costs less
        setattr(module, last, kernel.prepare(layer.weight, layer.bias))
    step_in_one_call(model)
    return "float32" if is_small else f"{kernel.name} weights"


def _choose(
    model: GPT, layers: list[nn.Linear], dtype: torch.dtype | None, rows: int, retune: bool
) -> Kernel:
    """Return the kernel that this machine has settled on for such a model."""
    candidates = {kernel.name: kernel for kernel in _candidates(dtype, layers)}
    rows = next((few for few in (1, 8) if rows <= few), 64)
    shapes = sorted({tuple(layer.weight.shape) for layer in layers})
    name = settled(
        f"{dtype} weights, {rows} rows, {shapes}, {native.SOURCE_MARK}",
        candidates,
        lambda: _autotune(list(candidates.values()), layers, rows, model.wte.weight).name,
        retune,
    )
    return candidates[name]


def _autotune(
    candidates: list[Kernel], layers: list[nn.Linear], rows: int, other: Tensor
) -> Kernel:
    """Time kernels on the blocks' largest matrices, and return the fastest that is right."""
    blocks = layers[:-1]  # all but the head
    largest = max(blocks, key=lambda layer: layer.weight.numel()).weight.shape
    timed = [layer for layer in blocks if layer.weight.shape == largest][:_TIMED]
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


def _candidates(dtype: torch.dtype | None, layers: list[nn.Linear]) -> list[Kernel]:
    """Return the kernels for weights of `dtype` on a CPU, the most exact and steady first."""
    if dtype is None:  # float16 first: it rounds 8 times finer, and weights are small numbers
        return [*_candidates(torch.float16, layers), *_candidates(torch.bfloat16, [])]
    ours, name = [], _name(dtype)
    widths = [layer.in_features for layer in layers]
    tall = all(layer.out_features >= 8 for layer in layers)
    if layers and tall and all(width % _WIDTH == 0 for width in widths) and native.library():
        ours = [Kernel(name, partial(Product, dtype))]
    if dtype == torch.int8:
        fits = all(width % _INT8_WIDTH == 0 for width in widths)
        return [*ours, *[INT8] * fits, INT8_PLAIN]
    plain = Kernel(f"{name} (torch)", partial(_plain, dtype))
    packed = Kernel(f"{name} (oneDNN)", partial(_packed, dtype))
    return [*ours, packed, plain] if dtype == torch.bfloat16 else [*ours, plain, packed]


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


def _int8(weight: Tensor, bias: Tensor | None) -> MatmulFn:
    (W, scales), b = quantize(weight), None if bias is None else bias.bfloat16()
    scales = scales[:, 0].contiguous()

    def product(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).bfloat16()
        y = torch._weight_int8pack_mm(rows, W, scales).view(*x.shape[:-1], -1).float()
        return y if b is None else y + b

    return product


def _int8_plain(weight: Tensor, bias: Tensor | None) -> MatmulFn:
    W, scales = quantize(weight)
    return lambda x: F.linear(x, widened(W, scales), bias)


INT8 = Kernel("int8 (torch)", _int8)
INT8_PLAIN = Kernel("int8, widened", _int8_plain)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
