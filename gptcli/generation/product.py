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
GROUP = 32  # weights that share a scale there
GROUP_WORDS = 17  # what so many numbers of a row take there, of 16 bits and with a scale
_PACK = 16  # rows that are packed together there


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
        self.shape = N, K
        self.few = few if library is not None and K % _WIDTH == 0 and N >= _HEIGHT else 0
        self.scales: Tensor | None = None
        if dtype == torch.int8:
            W, self.scales = quantize(weight, None if K % GROUP else GROUP)
            if self.few:
                W, self.scales = _packed(W.contiguous().view(torch.int16)), _packed(self.scales)
        else:
            W = weight.to(dtype)
        self.W, self.bias = W.contiguous(), None if bias is None else bias.float()
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
        N, K = self.shape
        n_rows = x.numel() // K
        if n_rows > self.few:
            W, scales = self.W, self.scales
            if self.few and scales is not None:
                W, scales = _unpacked(W, N).view(torch.int8), _unpacked(scales, N)
            W = W.to(self._wide) if scales is None else widened(W, scales.to(self._wide))
            y = F.linear(x.to(self._wide), W).float()
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


def _packed(rows: Tensor) -> Tensor:
    """Return rows (N, M) as (N / 16, M, 16), with rows of 0 to the last 16."""
    rows = F.pad(rows, (0, 0, 0, -len(rows) % _PACK))
    return rows.view(-1, _PACK, rows.shape[1]).transpose(1, 2).contiguous()


def _unpacked(packed: Tensor, N: int) -> Tensor:
    """Return the rows (N, M) again."""
    return packed.transpose(1, 2).contiguous().view(-1, packed.shape[1])[:N]


def widened(W: Tensor, scales: Tensor) -> Tensor:
    """Return the weight (N, K) that int8 weights stand for, in the precision of `scales`."""
    weight: Tensor = W.view(*scales.shape, -1) * scales[..., None]
    return weight.flatten(1)
