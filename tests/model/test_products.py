"""Products of ours beside those in float64, and what learns through them."""

import math

import pytest
import torch
from torch import Tensor

from gptcli import settled
from gptcli.model import loss, products
from tests.support.models import distance

HALF = torch.bfloat16
needs_products = pytest.mark.skipif(
    products._library(torch.float32) is None, reason="no compiler here"
)
needs_halves = pytest.mark.skipif(
    products._library(HALF) is None, reason="no instructions for bfloat16, or tiles, here"
)


@needs_products
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("is_slow", [True, False])
def test_a_linear_layer_learns_the_same_by_products_of_ours(
    is_slow: bool, has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_others_are_slow", lambda: is_slow)
    generator = torch.Generator().manual_seed(4)
    x, weight, bias, grad = (
        torch.randn(shape, generator=generator)
        for shape in ((3, 40, 48), (80, 48), (80,), (3, 40, 80))
    )

    def found(dtype: torch.dtype) -> list[Tensor]:
        factors = [t.to(dtype, copy=True).requires_grad_() for t in (x, weight, bias)]
        y = products.linear(factors[0], factors[1], factors[2] if has_bias else None)
        y.backward(grad.to(dtype))
        with torch.no_grad():
            again = products.linear(*factors[:2], factors[2] if has_bias else None)
        assert torch.equal(y.detach(), again)
        return [y.detach(), *(t.grad for t in factors if t.grad is not None)]

    for one, exact in zip(found(torch.float32), found(torch.float64), strict=True):
        assert distance(one, exact.float()) < 5e-7


@needs_products
@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize(
    "shape", [(16, 1, 1), (33, 40, 7), (70, 130, 300), (600, 96, 1025), (1100, 40, 270)], ids=str
)
def test_a_product_of_rows_or_columns(
    shape: tuple[int, int, int], turned: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_others_are_slow", lambda: True)
    M, N, K = shape
    draw = torch.Generator().manual_seed(5)
    a, b, before = (torch.randn(size, generator=draw) for size in ((M, K), (K, N), (M, N)))
    a, b = (t.T.contiguous().T if turn else t for t, turn in zip((a, b), turned, strict=True))
    exact, threads, found = a.double() @ b.double(), torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            fresh, total = torch.full((M, N), math.nan), before.clone()
            products.multiply_into(fresh, a, b)
            products.multiply_into(total, a, b, adds=True)
            found.append((fresh, total))
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *found))
    assert distance(found[0][0], exact) < 5e-7 and distance(found[0][1], exact + before) < 5e-7


@needs_halves
@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("b_dtype", [HALF, torch.float32], ids=str)
@pytest.mark.parametrize(
    "shape", [(16, 1, 1), (33, 40, 7), (70, 130, 300), (1100, 96, 1025), (40, 1100, 900)], ids=str
)
def test_a_product_in_bfloat16(
    shape: tuple[int, int, int],
    b_dtype: torch.dtype,
    turned: tuple[bool, bool],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "_others_are_slow", lambda: True)
    M, N, K = shape
    draw = torch.Generator().manual_seed(5)
    a, b, before = (torch.randn(size, generator=draw) for size in ((M, K), (K, N), (M, N)))
    exact = a.to(HALF).double() @ b.to(HALF).double()
    a, b = (t.T.contiguous().T if turn else t for t, turn in zip((a, b), turned, strict=True))
    total, rounded = before.clone(), torch.full((M + 1, N), math.nan, dtype=HALF)
    products.multiply_into(total, a.to(HALF), b.to(b_dtype), adds=True)
    products.multiply_into(rounded[:M], a.to(HALF), b.to(b_dtype))
    assert distance(total, exact + before) < 5e-7
    assert distance(rounded[:M], exact) < 4e-3 and rounded[M].isnan().all()
    if b_dtype == HALF:
        halves = before.to(HALF)
        products.multiply_into(halves, a.to(HALF), b.to(HALF), adds=True)
        assert distance(halves, exact + before.to(HALF)) < 5e-3


@needs_halves
@pytest.mark.parametrize("has_bias", [True, False])
def test_the_gradient_of_a_weight_is_not_rounded_to_bfloat16(
    has_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_others_are_slow", lambda: True)
    draw = torch.Generator().manual_seed(7)
    x, weight, bias, grad = (
        torch.randn(shape, generator=draw).requires_grad_()
        for shape in ((3, 41, 50), (80, 50), (80,), (3, 41, 80))
    )
    with torch.autocast("cpu", torch.bfloat16):
        y = products.linear(x, weight, bias if has_bias else None)
    y.backward(grad.to(HALF))
    rows, grads = (t.detach().to(HALF).double().flatten(0, -2) for t in (x, grad))
    factor = weight.detach().to(HALF).double()
    assert y.dtype == HALF and x.grad is not None and weight.grad is not None
    exact = rows @ factor.T + (bias.detach() if has_bias else 0)
    assert distance(y.detach().flatten(0, -2), exact) < 4e-3
    assert distance(x.grad.flatten(0, -2), grads @ factor) < 5e-7
    assert distance(weight.grad, grads.T @ rows) < 5e-7


@needs_products
@pytest.mark.parametrize("dtype", [HALF, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("x_dtype", [HALF, torch.float32, torch.float64], ids=str)
def test_a_layer_whose_weights_are_of_another_dtype(
    x_dtype: torch.dtype, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_others_are_slow", lambda: True)
    draw = torch.Generator().manual_seed(9)
    x, weight = (torch.randint(-3, 4, shape, generator=draw) for shape in ((40, 24), (30, 24)))
    bias, grad = torch.ones(30), torch.randint(-3, 4, (40, 30), generator=draw)
    factors = weight.to(dtype), bias.to(dtype)
    y = products.multiply_layer(x.to(x_dtype), *factors)
    assert y.dtype == x_dtype and y.equal((x @ weight.T + 1).to(x_dtype))
    for of_x in (HALF, torch.float32, torch.float64):
        found = products.gradient_of_x(grad.to(x_dtype), factors[0], of_x)
        assert found.equal((grad @ weight).to(of_x)) and found.dtype == of_x


@needs_halves
@pytest.mark.parametrize(("n_tokens", "rows"), [(5, 49), (40, 49), (300, 5)])
def test_a_head_of_few_rows_or_tokens_in_bfloat16(
    n_tokens: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_others_are_slow", lambda: True)
    monkeypatch.setattr(loss, "_TABLE", 17 * n_tokens)  # chunks of 17, 17 and 15 rows
    draw = torch.Generator().manual_seed(8)
    x, weight = torch.randn(1, rows, 24, generator=draw), torch.randn(n_tokens, 24, generator=draw)
    targets = torch.randint(n_tokens, (1, rows), generator=draw)

    def found(dtype: torch.dtype) -> list[Tensor]:
        factors = [t.to(HALF).to(dtype).requires_grad_() for t in (x, weight)]
        with torch.autocast("cpu", HALF, enabled=dtype == torch.float32):
            total = loss.cross_entropy(*factors, targets, n_tokens)
        total.backward()
        return [total.detach(), *(t.grad for t in factors if t.grad is not None)]

    for one, exact in zip(found(torch.float32), found(torch.float64), strict=True):
        assert distance(one, exact) < 1e-2


def test_a_product_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_others_are_slow", lambda: True)
    y = torch.full((20, 3), math.nan)
    products.multiply_into(y, torch.ones(0, 20).T, torch.ones(0, 3))
    assert y.eq(0).all()
    nothing = torch.empty(20, 0)
    products.multiply_into(nothing, torch.ones(20, 8), torch.ones(8, 0))
    assert products.multiply_layer(torch.ones(20, 8), torch.ones(0, 8), None).shape == (20, 0)


@needs_products
def test_a_row_is_the_same_among_any_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_others_are_slow", lambda: True)
    draw = torch.Generator().manual_seed(6)
    x, weight = torch.randn(700, 300, generator=draw), torch.randn(90, 300, generator=draw)
    every = products.multiply_layer(x, weight, None)
    for rows in (slice(0, 16), slice(5, 500), slice(680, 700)):
        assert torch.equal(products.multiply_layer(x[rows], weight, None), every[rows])


@needs_products
def test_a_matrix_that_lies_neither_by_rows_nor_by_columns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "_others_are_slow", lambda: True)
    a, b = torch.randn(40, 60)[:, ::2], torch.randn(30, 60)[:, ::3]
    y = torch.empty(40, 20)
    products.multiply_into(y, a, b)
    assert distance(y, a.double() @ b.double()) < 5e-7
    # Rows of one token each, which are contiguous whatever the stride of that token.
    x = torch.randn(1, 20, 30).transpose(0, 1)
    assert x.is_contiguous() and x.stride(1) != 30
    y = products.multiply_layer(x, b.T, None).view(20, 20)
    assert distance(y, x.view(20, 30).double() @ b.double()) < 5e-7


@pytest.mark.parametrize(
    ("vendor", "capability", "is_slow"),
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", True),
     ("AuthenticAMD", "DEFAULT", False), ("GenuineIntel", "AVX512", False)],
)  # fmt: skip
def test_whose_products_are_ours(
    vendor: str, capability: str, is_slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settled, "processor", lambda: f"model name: Virtual\nvendor_id: {vendor}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert products._others_are_slow.__wrapped__() == is_slow


def test_whatever_learns_has_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_others_are_slow", lambda: True)
    for learning in range(8):
        factors = torch.ones(20, 8), torch.ones(16, 8), torch.ones(16)
        for bit, factor in enumerate(factors):
            factor.requires_grad_(bool(learning >> bit & 1))
        y = products.linear(*factors)
        if learning:
            y.sum().backward()
        assert [t.grad is not None for t in factors] == [t.requires_grad for t in factors]
