"""A product of few rows by a matrix, at the speed at which memory gives the matrix."""

import torch
import torch.nn.functional as F
from torch import Tensor

from gptcli.device import multiplies_bfloat16
from gptcli.generation import native

FEW = 32  # rows up to which matvec.c is faster than a product of matrices
_KINDS = (torch.float32, torch.float16, torch.bfloat16, torch.int8)  # matvec.c's numbers for them
_GROUP = 32  # weights that share a scale there


class Product:
    """Multiplies few rows by matvec.c, and many by torch with the weight widened for the call."""

    def __init__(self, dtype: torch.dtype, weight: Tensor, bias: Tensor | None) -> None:
        quantized = dtype == torch.int8
        W, scales = quantize(weight, _GROUP) if quantized else (weight.to(dtype), None)
        self.scales: Tensor | None = scales
        self.W, self.bias = W.contiguous(), None if bias is None else bias.float()
        is_wide = dtype == torch.float32 or not multiplies_bfloat16()
        self._wide = torch.float32 if is_wide else torch.bfloat16
        library = native.library()
        assert library is not None
        self._multiply, self._threads = library.matvec, torch.get_num_threads()
        self.kind = _KINDS.index(dtype)
        pointers = (self.W, self.scales, self.bias)
        self.pointers = [None if one is None else one.data_ptr() for one in pointers]

    def __call__(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        N, K = self.W.shape
        n_rows = x.numel() // K
        if n_rows > FEW:
            W = self.W if self.scales is None else widened(self.W, self.scales)
            y = F.linear(x.to(self._wide), W.to(self._wide)).float()
            return y if self.bias is None else y + self.bias
        x, y = x.contiguous(), x.new_empty(*x.shape[:-1], N)
        place, threads = y.data_ptr(), self._threads
        self._multiply(self.kind, x.data_ptr(), *self.pointers, place, N, K, n_rows, threads)
        return y


def quantize(weight: Tensor, group: int | None = None) -> tuple[Tensor, Tensor]:
    """Return int8 weights (N, K) and their scales (N, K / group), of whole rows without a group.

    Symmetric: the largest of a group is 127.
    """
    groups = weight.float().reshape(len(weight), -1, group or weight.shape[1])
    largest = torch.maximum(groups.amax(-1), -groups.amin(-1))
    scales = (largest / 127).clamp(min=1e-12).bfloat16()  # as they will be used
    rounded = (groups / scales.float()[..., None]).round_().clamp_(-127, 127)
    return rounded.to(torch.int8).flatten(1), scales


def widened(W: Tensor, scales: Tensor) -> Tensor:
    """Return the weight (N, K) that int8 weights stand for."""
    weight: Tensor = W.view(*scales.shape, -1) * scales.float()[..., None]
    return weight.flatten(1)
