"""The loss in pieces is the plain cross entropy, and so are its gradients."""

import pytest
import torch
import torch.nn.functional as F

from gptcli.model import loss as module
from gptcli.model.loss import IGNORED, cross_entropy, token_losses


def sample(n_rows: int, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, n_rows // 2, 8, generator=generator)
    weight = torch.randn(vocab_size, 8, generator=generator)
    targets = torch.randint(0, vocab_size, (2, n_rows // 2), generator=generator)
    targets[0, 1] = IGNORED
    return x.requires_grad_(), weight.requires_grad_(), targets


def plain(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = F.linear(x, weight).float().flatten(0, 1)
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")


@pytest.mark.parametrize(("table", "columns", "piece"), [(1 << 25, 1 << 13, 1 << 20), (175, 7, 40)])
def test_it_is_the_cross_entropy(
    table: int, columns: int, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TABLE", table)  # 7 rows at a time of 25 logits
    monkeypatch.setattr(module, "_COLUMNS", columns)
    monkeypatch.setattr(module, "_PIECE", piece)
    x, weight, targets = sample(20, 25)
    expected = plain(x, weight, targets)
    wanted = torch.autograd.grad(expected / 3, (x, weight))
    found = cross_entropy(x, weight, targets, len(weight))
    assert torch.allclose(found, expected, rtol=1e-6)
    for one, other in zip(torch.autograd.grad(found / 3, (x, weight)), wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(cross_entropy(x, weight, targets, len(weight)), found)


def test_in_bfloat16_it_is_as_exact_as_autocast() -> None:
    x, weight, targets = sample(64, 300)
    exact = torch.autograd.grad(plain(x, weight, targets), (x, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = torch.autograd.grad(plain(x, weight, targets), (x, weight))
        ours = torch.autograd.grad(cross_entropy(x, weight, targets, len(weight)), (x, weight))
    for one, other, true in zip(ours, theirs, exact, strict=True):
        assert one.dtype == torch.float32
        assert (one - true).norm() <= 1.1 * (other - true).norm()


def test_a_frozen_head_gets_no_gradient() -> None:
    x, weight, targets = sample(20, 25)
    expected = torch.autograd.grad(plain(x, weight, targets), x)[0]
    weight.requires_grad_(False)
    torch.autograd.backward(cross_entropy(x, weight, targets, len(weight)))
    assert x.grad is not None and torch.allclose(x.grad, expected, rtol=1e-5, atol=1e-6)
    assert weight.grad is None


def test_all_ignored_is_nothing() -> None:
    x, weight, targets = sample(20, 25)
    loss = cross_entropy(x, weight, torch.full_like(targets, IGNORED), len(weight))
    torch.autograd.backward(loss)
    assert loss.item() == 0 and x.grad is not None and not x.grad.any()


def test_a_logit_that_is_not_finite_is_not_hidden() -> None:
    x, weight, targets = sample(20, 25)
    with torch.no_grad():
        weight[3, 0] = float("nan")
    assert not torch.isfinite(cross_entropy(x, weight, targets, len(weight)))


def test_rows_that_no_token_has_take_no_probability_and_no_gradient() -> None:
    x, weight, targets = sample(20, 25)
    expected = torch.autograd.grad(plain(x, weight[:19], targets % 19), (x, weight))
    found = cross_entropy(x, weight, targets % 19, 19)
    assert torch.allclose(found, plain(x, weight[:19], targets % 19), rtol=1e-6)
    assert torch.equal(token_losses(x, weight, targets % 19, 19).sum(), found)
    for one, other in zip(torch.autograd.grad(found, (x, weight)), expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)
    assert not torch.autograd.grad(cross_entropy(x, weight, targets % 19, 19), weight)[0][19:].any()
