"""Queries, keys and values in one pass of kernels.c are those of torch's operations."""

import math
from unittest import mock

import pytest
import torch
from torch import Tensor

from gptcli import native
from gptcli.config.model import ModelConfig
from gptcli.model import GPT, gpt, kernels

VARIANTS = {
    "rope": {},
    "norms": {"qk_norm": True},
    "norms without rope": {"qk_norm": True, "position": "learned"},
    "offset": {"qk_norm": True, "key_offset": True},
    "values": {"qk_norm": True, "key_offset": True, "n_value_embd": 2},
    "grouped": {"qk_norm": True, "key_offset": True, "n_value_embd": 1, "n_kv_head": 2},
    "squared ReLU": {"qk_norm": True, "mlp": "relu2"},
    "SwiGLU": {"qk_norm": True, "mlp": "swiglu"},
    "odd sizes": {"qk_norm": True, "key_offset": True, "n_embd": 4 * 44},
}


def gradients(model: GPT, tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    enabled = dtype != torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        loss = model(tokens[:, :-1], tokens[:, 1:]).loss
    (loss / tokens.numel()).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), found


def network(**changes: object) -> GPT:
    sizes: dict[str, object] = {
        "n_layer": 2, "n_head": 4, "n_embd": 128, "block_size": 256, "vocab_size": 64,
        "position": "rope", "tie_embeddings": False,
    }  # fmt: skip
    model = GPT(ModelConfig.model_validate(sizes | changes))
    model.init_weights(1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # nothing is zero or one, so that every path has a gradient
        for parameter in model.parameters():
            parameter.add_(torch.empty(parameter.shape).normal_(0, 0.1, generator=generator))
    return model


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize(("n_tokens", "dtype"), [(37, torch.float32), (37, torch.bfloat16),
                                                 (150, torch.bfloat16)])  # fmt: skip
def test_same_losses_and_gradients(
    changes: dict[str, object], n_tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(**changes)
    tokens = torch.randint(64, (3, n_tokens + 1), generator=torch.Generator().manual_seed(3))
    used = mock.Mock(side_effect=kernels.split_heads)
    monkeypatch.setattr(gpt, "split_heads", used)
    loss, found = gradients(model, tokens, dtype)
    if not used.called:
        pytest.skip("no compiler on this machine")
    with kernels.torch_only():
        expected_loss, expected = gradients(model, tokens, dtype)
    assert used.call_count == 2
    assert found.keys() == expected.keys()
    if dtype == torch.float32:
        torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
        for name, gradient in found.items():
            assert distance(gradient, expected[name]) < 2e-6, name
        return
    # Both round; the one pass rounds less often, and is to be no farther from what is exact.
    exact_loss, exact = gradients(model, tokens, torch.float32)
    torch.testing.assert_close(loss, exact_loss, rtol=2e-3, atol=0)
    whole, one_by_one, best = (
        torch.cat([g[name].flatten() for name in exact]) for g in (found, expected, exact)
    )
    assert distance(whole, best) < 1.1 * distance(one_by_one, best)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_threads_do_not_change_the_bits() -> None:
    model = network(qk_norm=True, key_offset=True)
    tokens = torch.randint(64, (5, 38), generator=torch.Generator().manual_seed(3))
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(gradients(model, tokens, torch.float32)[1]["h.0.attn.k_norm.weight"])
        assert torch.equal(*found)
    finally:
        torch.set_num_threads(threads)


def test_what_is_not_split_at_once() -> None:
    rows = torch.zeros(2, 3, 96)
    assert not kernels.can_split(rows.half(), 32, False)
    assert not kernels.can_split(rows, 16, False)
    assert not kernels.can_split(rows, 512, False)
    assert not kernels.can_split(rows, 34, True)


def heads_of(rows: Tensor, head_size: int) -> tuple[Tensor, Tensor, Tensor]:
    weights = torch.ones(head_size), torch.ones(head_size)
    shape = 1, 1, head_size
    return kernels.split_heads(rows, None, weights, None, shape, 1e-5, True, torch.bfloat16)


@pytest.mark.skipif(kernels._library() is None, reason="no compiler on this machine")
def test_what_is_not_finite_stays_so_and_what_is_huge_does_not_become_it() -> None:
    rows = torch.ones(1, 3, 3 * 44)
    rows[0, 1, 50] = math.nan  # of the second key
    _, key, _ = heads_of(rows, 44)
    assert key[0, 0, 1].isnan().any() and key[0, 0, 2].isnan().any()  # its late half moved on
    q, key, _ = heads_of(torch.full((1, 3, 3 * 44), 1e20), 44)  # whose squares are infinite
    assert q.eq(0).all() and key.eq(0).all()
    x = torch.tensor([math.nan, -1e38, -math.inf, 1.0] * 8, requires_grad=True)
    assert kernels.squared_relu(x)[:4].isnan().tolist() == [True, False, False, False]
    assert kernels.swiglu(x, torch.ones(32))[1] == 0


def test_a_cache_that_cannot_be_written_costs_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels._library() is None:
        pytest.skip("no compiler on this machine")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/self")
    assert native.build(kernels._SOURCE) is not None


def test_sums_of_squares_are_those_of_float64() -> None:
    tensors = [torch.randn(n) for n in (0, 1, 31, 8192, 8193, 40_000)] + [torch.randn(50, 60).T]
    expected = sum(float(t.double().square().sum()) for t in tensors)
    assert float(kernels.sum_of_squares(tensors)) == pytest.approx(expected, rel=1e-14)
