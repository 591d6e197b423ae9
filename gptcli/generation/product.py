"""A product of few rows by a matrix, at the speed at which memory gives the matrix."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptcli.device import multiplies_bfloat16
from gptcli.generation import native

FEW = 32  # rows up to which matvec.c is faster than a product of matrices
KINDS = (torch.float32, torch.float16, torch.bfloat16, torch.int8)  # matvec.c's numbers for them
_WIDTH, _HEIGHT = 64, 8  # columns that matvec.c takes multiples of; rows that it takes at least
_GROUP = 32  # weights that share a scale there


class Product:
    """Multiplies few rows by matvec.c, and many by torch with the weight widened for the call.

    Without matvec.c, or for a matrix of another width, torch multiplies all.

    Attributes:
        few: Rows up to which matvec.c multiplies.
    """

    def __init__(
        self, dtype: torch.dtype, weight: Tensor, bias: Tensor | None, few: int = FEW
    ) -> None:
        (N, K), library = weight.shape, native.library()
        self.scales: Tensor | None = None
        if dtype == torch.int8:
            W, self.scales = quantize(weight, None if K % _GROUP else _GROUP)
        else:
            W = weight.to(dtype)
        self.W, self.bias = W.contiguous(), None if bias is None else bias.float()
        self.few = few if library is not None and K % _WIDTH == 0 and N >= _HEIGHT else 0
        if not self.few and self.scales is None:
            self._wide = dtype  # to widen it for every token would take longer
        else:
            is_wide = dtype == torch.float32 or not multiplies_bfloat16()
            self._wide = torch.float32 if is_wide else torch.bfloat16
        self._multiply: Any = None if library is None else library.matvec
        self._threads = torch.get_num_threads()
        self.kind = KINDS.index(dtype)
        pointers = (self.W, self.scales, self.bias)
        self.pointers = [None if one is None else one.data_ptr() for one in pointers]

    def __call__(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32
        N, K = self.W.shape
        n_rows = x.numel() // K
        if n_rows > self.few:
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
