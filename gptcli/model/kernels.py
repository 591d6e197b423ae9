"""kernels.c: what lies between the products of a training step on a CPU, each in one pass.

A small network spends as long on it as on its products. A gradient cannot be differentiated again.
Letters as in gpt.py.
"""

import contextlib
import ctypes
import functools
from collections.abc import Iterator, Mapping, Sequence
from ctypes import c_float, c_int, c_long, c_void_p
from itertools import accumulate
from math import ceil
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_SOURCE = Path(__file__).with_name("kernels.c")
SHORTEST, _LONGEST, _ROWS, _CHUNK = 32, 256, 32, 8192  # as there
_HALF = torch.bfloat16
_KINDS = ("relu2", "swiglu", "gelu", "gelu_erf")  # as there


def _structure(pointers: str, longs: str, ints: str, floats: str = "") -> type[ctypes.Structure]:
    """Return a structure of kernels.c, whose fields are in the order of their types."""
    kinds: Any = (c_void_p, pointers), (c_long, longs), (c_float, floats), (c_int, ints)

    class Structure(ctypes.Structure):
        _fields_ = [(name, kind) for kind, names in kinds for name in names.split()]

    return Structure


_Heads = _structure(
    pointers="inputs rows q_weight k_weight rotation value q k v value_grad weight_grads",
    longs="B T H G D is_offset rows_half heads_half", floats="eps", ints="next",
)  # fmt: skip
_Squares = _structure(pointers="tensors sizes ends sums", longs="n", ints="next")
_Norm = _structure(
    pointers="x grad weight y weight_grads", longs="n C x_half grad_half y_half",
    floats="eps", ints="next",
)  # fmt: skip
_Losses = _structure(pointers="logits targets losses", longs="n V", ints="half needs_grad next")
_Pass = _structure(pointers="x up grad y up_grad", longs="n", ints="kind half next")

Tensors = Mapping[str, Tensor | None]
_in_use = True


@contextlib.contextmanager
def torch_only() -> Iterator[None]:
    """Use torch's operations during the block, as other devices do."""
    global _in_use
    before, _in_use = _in_use, False
    try:
        yield
    finally:
        _in_use = before


def can_run(x: Tensor) -> bool:
    """Tell whether the kernels take x: on a CPU, where torch compiles no others."""
    is_one = x.device.type == "cpu" and x.dtype in (torch.float32, _HALF)
    return is_one and _in_use and not torch.compiler.is_compiling() and _library() is not None


@functools.cache
def _library() -> ctypes.CDLL | None:
    from gptcli.native import build  # which only training on a CPU needs

    return build(_SOURCE)


def can_split(rows: Tensor, head_size: int, is_offset: bool) -> bool:
    """Tell whether `split_heads` takes what c_attn gave."""
    is_whole = SHORTEST <= head_size <= _LONGEST and head_size % (4 if is_offset else 2) == 0
    return is_whole and can_run(rows)


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of the squares of all numbers, a float64 scalar, on the tensors' device."""
    is_ours = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
    library = _library() if is_ours else None
    if library is None:
        # A Mac's GPU has no float64.
        dtype = torch.float32 if tensors[0].device.type == "mps" else torch.float64
        norms = torch.stack(torch._foreach_norm(list(tensors), 2, dtype=dtype))
        return (norms * norms).sum()
    whole = [t.contiguous() for t in tensors]
    sizes = [t.numel() for t in whole]
    ends = list(accumulate(ceil(size / _CHUNK) for size in sizes))
    sums, each = torch.empty(ends[-1], dtype=torch.float64), c_long * len(whole)
    arrays = (c_void_p * len(whole))(*[t.data_ptr() for t in whole]), each(*sizes), each(*ends)
    addresses = [ctypes.addressof(array) for array in arrays]
    job = _Squares(*addresses, sums.data_ptr(), len(whole))
    library.sum_of_squares(ctypes.byref(job), min(len(sums), torch.get_num_threads()))
    return sums.sum()


def split_heads(
    rows: Tensor,
    value: Tensor | None,
    weights: tuple[Tensor, Tensor] | tuple[None, None],
    rotation: Tensor | None,
    shape: tuple[int, int, int],
    eps: float,
    is_offset: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries (B, H, T, D), keys and values (B, G, T, D).

    Args:
        rows: What c_attn gave, (B, T, (H + 2 G) D), float32 or bfloat16.
        value: What is added to the values, (B, T, G D) float32.
        weights: Of the norms of queries and of keys, (D) float32; None without norms.
        rotation: Cosines and sines, (2, T, D) float32.
        shape: H, G and D.
        eps: Of the norms.
        is_offset: Whether the late half of each key moves one token on.
        dtype: Of what is returned: float32 or bfloat16.
    """
    apply: Any = _SplitHeads.apply
    found: tuple[Tensor, Tensor, Tensor] = apply(
        rows, value, *weights, rotation, shape, eps, is_offset, dtype
    )
    return found


class _SplitHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        value: Tensor | None,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        rotation: Tensor | None,
        shape: tuple[int, int, int],
        eps: float,
        is_offset: bool,
        dtype: torch.dtype,
    ) -> tuple[Tensor, ...]:
        (B, T, _), (H, G, D), rows = rows.shape, shape, rows.contiguous()
        value = None if value is None else value.contiguous()
        heads = tuple(rows.new_empty(B, n, T, D, dtype=dtype) for n in (H, G, G))
        ctx.save_for_backward(None if q_weight is None else rows, q_weight, k_weight, rotation)
        ctx.job = {"B": B, "T": T, "H": H, "G": G, "D": D, "is_offset": is_offset, "eps": eps,
                   "rows_half": rows.dtype == _HALF, "heads_half": dtype == _HALF}  # fmt: skip
        ctx.of_rows, ctx.has_value = (rows.shape, rows.dtype), value is not None
        tensors = {"inputs": rows, "q_weight": q_weight, "k_weight": k_weight,
                   "rotation": rotation, "value": value}  # fmt: skip
        _run("heads", _Heads, {**tensors, **dict(zip("qkv", heads, strict=True))}, **ctx.job)
        return heads

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        rows, q_weight, k_weight, rotation = ctx.saved_tensors
        (B, T, width), dtype = ctx.of_rows
        q, k, v = (grad.contiguous() for grad in grads)
        grad, G, D = q.new_empty(B, T, width, dtype=dtype), ctx.job["G"], ctx.job["D"]
        value_grad = q.new_empty(B, T, G * D, dtype=torch.float32) if ctx.has_value else None
        parts = q.new_zeros(ceil(B * T / _ROWS), 2, D, dtype=torch.float32)
        tensors = {"rows": grad, "inputs": rows, "q_weight": q_weight, "k_weight": k_weight,
                   "rotation": rotation, "q": q, "k": k, "v": v, "value_grad": value_grad,
                   "weight_grads": parts}  # fmt: skip
        _run("heads", _Heads, tensors, **ctx.job)
        weight_grads = (None, None) if q_weight is None else parts.sum(0).unbind()
        return grad, value_grad, *weight_grads, None, None, None, None, None


def is_fake(x: Tensor) -> bool:
    """Tell whether x has a shape only: nothing is computed for an estimate of memory."""
    return type(x).__name__ == "FakeTensor"


def _run(name: str, job: type[ctypes.Structure], tensors: Tensors, **values: Any) -> None:
    """Call a function of kernels.c, unless there is nothing to compute with."""
    library = _library()
    if library is not None and not any(is_fake(t) for t in tensors.values() if t is not None):
        found = job(**values, **pointers(tensors))
        getattr(library, name)(ctypes.byref(found), torch.get_num_threads())


def can_normalize(x: Tensor, weight: Tensor) -> bool:
    """Tell whether `rms_norm` takes x; without a gradient, torch is as fast."""
    is_whole = x.shape[-1] % 16 == 0 and weight.dtype == torch.float32
    return is_whole and x.requires_grad and can_run(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Return x (..., C) divided by its root mean square, times a weight (C), in a dtype."""
    apply: Any = _RMSNorm.apply
    y: Tensor = apply(x, weight, eps, dtype)
    return y


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _normalize(x, weight, eps, torch.empty_like(x, dtype=dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad, n_rows = grads[0].contiguous(), x.numel() // x.shape[-1]
        parts = torch.zeros(ceil(n_rows / _ROWS), x.shape[-1], device=grad.device)
        of_x = _normalize(x, weight, ctx.eps, torch.empty_like(x), grad, parts)
        return of_x, parts.sum(0), None, None


def _normalize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    y: Tensor,
    grad: Tensor | None = None,
    weight_grads: Tensor | None = None,
) -> Tensor:
    """Fill y, and the gradients of the weight by chunks."""
    tensors = {"x": x, "weight": weight, "y": y, "grad": grad, "weight_grads": weight_grads}
    halves = {f"{name}_half": t is not None and t.dtype == _HALF
              for name, t in (("x", x), ("y", y), ("grad", grad))}  # fmt: skip
    C = x.shape[-1]
    _run("normalize", _Norm, tensors, n=x.numel() // C, C=C, eps=eps, **halves)
    return y


def losses(logits: Tensor, targets: int, needs_grad: bool) -> Tensor | None:
    """Return the losses (N,) of logits (N, V) as `loss.py` does; None where it is torch's to do.

    Args:
        logits: Overwritten by their gradient if that is needed.
        targets: Where N ids, int64, are in memory.
        needs_grad: Whether it is.
    """
    if not can_run(logits):
        return None
    (n, V), half, found = logits.shape, logits.dtype == _HALF, torch.empty(len(logits))
    tensors = {"logits": logits, "losses": found}
    _run("losses", _Losses, tensors, targets=targets, n=n, V=V, half=half, needs_grad=needs_grad)
    return found


def activate(kind: str, x: Tensor, up: Tensor | None) -> Tensor:
    """Return what `activation` of products.py does."""
    if kind == "gelu_erf":  # torch is as fast
        return F.gelu(x)
    y = torch.empty_like(x)
    _activate(kind, {"x": x, "up": up, "y": y})
    return y


def activate_back(
    kind: str, x: Tensor, up: Tensor | None, grad: Tensor, y: Tensor | None
) -> Tensor | None:
    """Turn the gradient of the value into that of x, in place; return that of up.

    The value is found on the way: it fills y, if that is given.
    """
    up_grad = None if up is None else torch.empty_like(up)
    _activate(kind, {"x": x, "up": up, "grad": grad, "y": y, "up_grad": up_grad})
    return up_grad


def _activate(kind: str, tensors: dict[str, Tensor | None]) -> None:
    x = tensors["x"]
    assert x is not None
    is_half = x.dtype == _HALF
    _run("activate", _Pass, tensors, n=x.numel(), kind=_KINDS.index(kind), half=is_half)


def pointers(tensors: Tensors) -> dict[str, int]:
    """Return where the tensors that are there are in memory."""
    return {name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None}
