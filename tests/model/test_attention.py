"""attention.c computes what torch's attention does, as exactly, and the same with any threads."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptcli.model import attention, kernels
from tests.support.models import distance

DTYPES = [
    pytest.param(
        dtype,
        id=str(dtype).removeprefix("torch."),
        marks=pytest.mark.skipif(
            attention._library(dtype) is None,
            reason="no compiler, or no vectors that multiply it, on this machine",
        ),
    )
    for dtype in (torch.float32, torch.bfloat16)
]
each_dtype = pytest.mark.parametrize("dtype", DTYPES)

# B, H, G, T, D: blocks are of 32 tokens, and of 32 numbers of a head.
SHAPES = [(2, 2, 2, 2, 32), (1, 4, 2, 33, 44), (1, 4, 1, 64, 64), (2, 3, 3, 97, 16),
          (1, 2, 2, 200, 128), (1, 1, 1, 160, 256)]  # fmt: skip


def heads(
    dtype: torch.dtype, B: int, H: int, G: int, T: int, D: int
) -> tuple[list[Tensor], Tensor]:
    """Return queries, keys and values, and a gradient that is laid out as (B, T, H, D)."""
    draw = torch.Generator().manual_seed(1)
    found = [torch.randn(B, n, T, D, generator=draw).mul(2).to(dtype) for n in (H, G, G)]
    gradient = torch.randn(B, T, H, D, generator=draw).to(dtype).transpose(1, 2)
    return [x.requires_grad_() for x in found], gradient


def results(leaves: list[Tensor], gradient: Tensor) -> list[Tensor]:
    y = attention.attention(*leaves, 0.0, None)
    return [y.detach(), *torch.autograd.grad(y, leaves, gradient)]


def exact(leaves: list[Tensor], gradient: Tensor) -> list[Tensor]:
    wide = [x.detach().double().requires_grad_() for x in leaves]
    y = F.scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True)
    return [y.detach(), *torch.autograd.grad(y, wide, gradient.double())]


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_and_its_gradients(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype
) -> None:
    leaves, gradient = heads(dtype, *shape)
    found = results(leaves, gradient)
    y = F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
    of_torch = [y.detach(), *torch.autograd.grad(y, leaves, gradient)]  # in this dtype, too
    for ours, theirs, best in zip(found, of_torch, exact(leaves, gradient), strict=True):
        assert ours.dtype == dtype
        # In float32 the order of sums decides who is nearer.
        factor = 2 if dtype == torch.float32 else 1.1
        assert distance(ours, best) < factor * distance(theirs, best)


@each_dtype
@pytest.mark.parametrize("strides", ["of heads", "spread"])
def test_gradients_of_any_layout(strides: str, dtype: torch.dtype) -> None:
    leaves, gradient = heads(dtype, 2, 3, 3, 40, 32)
    expected = results(leaves, gradient)
    spread = torch.zeros(2, 3, 40, 64, dtype=dtype)[..., ::2]
    other = gradient.contiguous() if strides == "of heads" else spread.copy_(gradient)
    assert other.stride() != gradient.stride()
    for one, two in zip(results(leaves, other), expected, strict=True):
        assert torch.equal(one, two)


@each_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_attend_as_their_heads_do(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype
) -> None:
    leaves, gradient = heads(dtype, *shape)
    expected = results(leaves, gradient)
    B, H, G, T, D = shape
    rows = torch.cat([x.detach() for x in leaves], 1).transpose(1, 2).flatten(2).requires_grad_()
    assert attention.can_attend(rows, D)
    same = [nn.Linear(width, width, bias=False, dtype=dtype) for width in (rows.shape[2], H * D)]
    for layer in same:
        nn.init.eye_(layer.weight)
    y = attention.attention_branch(rows, *same, H, G)
    [of_rows] = torch.autograd.grad(y, rows, gradient.transpose(1, 2).flatten(2))
    of_heads = of_rows.view(B, T, H + 2 * G, D).transpose(1, 2).split((H, G, G), 1)
    y = y.view(B, T, H, D).transpose(1, 2)
    for one, two in zip((y.detach(), *of_heads), expected, strict=True):
        assert torch.equal(one, two)


@each_dtype
def test_what_is_in_other_rows_heads_and_later_tokens_changes_nothing(dtype: torch.dtype) -> None:
    leaves, gradient = heads(dtype, 2, 4, 2, 70, 32)
    before = results(leaves, gradient)
    with torch.no_grad():
        for leaf in leaves:
            leaf[1] += 1  # another row
            leaf[0, leaf.shape[1] // 2 :] -= 1  # the second group of heads
            leaf[0, 0, 50:] *= 2  # later
    after = results(leaves, gradient)
    assert torch.equal(before[0][0, 0, :50], after[0][0, 0, :50])
    assert not torch.equal(before[0][0, 0, 50:], after[0][0, 0, 50:])


@each_dtype
def test_threads_do_not_change_the_bits(dtype: torch.dtype) -> None:
    leaves, gradient = heads(dtype, 3, 4, 2, 90, 48)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(results(leaves, gradient))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


@each_dtype
def test_what_is_not_a_number_stays_so(dtype: torch.dtype) -> None:
    leaves, gradient = heads(dtype, 1, 1, 1, 64, 32)
    with torch.no_grad():
        leaves[1][0, 0, 40, 3] = torch.nan
    y, of_q, of_k, _ = results(leaves, gradient)
    assert not y[0, 0, :40].isnan().any() and y[0, 0, 40:].isnan().all()
    assert of_q.isnan().any() and of_k.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_torchs_products_are_right_after_ours(dtype: torch.dtype) -> None:
    """Both set up the processor's tiles."""
    a = torch.randn(96, 96).to(dtype)
    expected = a @ a
    results(*heads(dtype, 1, 2, 2, 64, 64))
    assert torch.equal(a @ a, expected)


@each_dtype
def test_what_is_left_to_torch(dtype: torch.dtype) -> None:
    x = torch.zeros(1, 1, 64, 32, dtype=dtype, requires_grad=True)
    assert attention._is_ours(x, 64, dtype)
    assert not attention._is_ours(x.detach(), 64, dtype)  # has no gradient
    assert not attention._is_ours(x.half(), 64, dtype)
    assert not attention._is_ours(x, 1, dtype)
    assert attention.fastest_dtype(torch.zeros(1, 64, 96)) == torch.float32
    with kernels.torch_only():
        assert attention.fastest_dtype(x.flatten(0, 1)) == torch.float32
