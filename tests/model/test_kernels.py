"""What kernels.c computes in one pass is what torch's operations compute."""

import math
from unittest import mock

import pytest
import torch
from torch import Tensor

from gptcli import native
from gptcli.config.model import ModelConfig
from gptcli.model import GPT, gpt, kernels, loss, products
from tests.support.models import distance

VARIANTS = {
    "rope": {},
    "norms": {"qk_norm": True},
    "norms without rope": {"qk_norm": True, "position": "learned"},
    "offset": {"qk_norm": True, "key_offset": True},
    "values": {"qk_norm": True, "key_offset": True, "n_value_embd": 2},
    "grouped": {"qk_norm": True, "key_offset": True, "n_value_embd": 1, "n_kv_head": 2},
    "squared ReLU": {"qk_norm": True, "mlp": "relu2"},
    "SwiGLU": {"qk_norm": True, "mlp": "swiglu"},
    "GELU by erf": {"mlp": "gelu_erf", "bias": False},
    "rmsnorm": {"norm": "rmsnorm"},
    "odd sizes": {"qk_norm": True, "key_offset": True, "n_embd": 4 * 44},
    "GPT-2": {"position": "learned"},
    "grouped GPT-2": {"position": "learned", "n_kv_head": 2, "n_embd": 4 * 36},
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
@pytest.mark.parametrize("products_are_ours", [False, True])
@pytest.mark.parametrize(("n_tokens", "dtype"), [(37, torch.float32), (37, torch.bfloat16),
                                                 (150, torch.bfloat16)])  # fmt: skip
def test_same_losses_and_gradients(
    changes: dict[str, object],
    n_tokens: int,
    dtype: torch.dtype,
    products_are_ours: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = network(**changes)
    tokens = torch.randint(64, (3, n_tokens + 1), generator=torch.Generator().manual_seed(3))
    used = mock.Mock()
    for name in ("split_heads", "attention_branch"):
        used.attach_mock(mock.Mock(side_effect=getattr(gpt, name)), name)
        monkeypatch.setattr(gpt, name, getattr(used, name))
    monkeypatch.setattr(products, "_others_are_slow", lambda: products_are_ours)
    loss, found = gradients(model, tokens, dtype)
    if not used.mock_calls:
        pytest.skip("no compiler on this machine")
    with kernels.torch_only():
        expected_loss, expected = gradients(model, tokens, dtype)
    is_plain = changes.get("position") == "learned" and not changes.get("qk_norm")
    assert len(used.mock_calls) == 2 and (is_plain or not used.attention_branch.called)
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


def test_an_activation_of_few_numbers() -> None:
    model = network(position="learned", n_inner=8)
    tokens = torch.arange(4).view(1, 4)
    _, found = gradients(model, tokens, torch.float32)
    with kernels.torch_only():
        _, expected = gradients(model, tokens, torch.float32)
    for name, gradient in found.items():
        assert distance(gradient, expected[name]) < 2e-6, name


@pytest.mark.parametrize("mlp", ["gelu_erf", "swiglu"])
@pytest.mark.parametrize("frozen", ["c_attn", "c_fc", "c_gate", "c_proj", "bias"])
def test_a_branch_whose_layers_are_frozen_in_part(mlp: str, frozen: str) -> None:
    model = network(position="learned", bias=True, mlp=mlp)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    tokens = torch.randint(64, (3, 38), generator=torch.Generator().manual_seed(7))
    loss, found = gradients(model, tokens, torch.float32)
    with kernels.torch_only():
        expected_loss, expected = gradients(model, tokens, torch.float32)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    assert found.keys() == expected.keys() and not any(frozen in name for name in found)
    for name, gradient in found.items():
        assert distance(gradient, expected[name]) < 2e-6, name


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
    x = torch.tensor([math.nan, -1e38, -math.inf, 1.0, 1e18] * 8)
    for kind in ("relu2", "gelu", "gelu_erf"):
        slope, again = torch.ones(40), torch.empty(40)
        y = kernels.activate(kind, x, None)
        kernels.activate_back(kind, x, None, slope, again)
        for found in (y, again):
            assert found[:5].isnan().tolist() == [True, False, kind != "relu2", False, False]
        assert slope[0].isnan() and slope[3:5].gt(0).all()
    assert kernels.activate("swiglu", x, torch.ones(40))[1] == 0


@pytest.mark.skipif(kernels._library() is None, reason="no compiler on this machine")
@pytest.mark.parametrize("n", [8192 + 5, 7])  # what is left over is less than a vector
def test_the_normal_gelu_and_its_slope(n: int) -> None:
    x = torch.linspace(-9, 9, n)
    exact = x.double()
    gate = 0.5 * torch.special.erfc(-exact / math.sqrt(2))
    density = torch.exp(-exact.square() / 2) / math.sqrt(2 * math.pi)
    slope, y = torch.ones(n), torch.empty(n)
    kernels.activate_back("gelu_erf", x, None, slope, y)
    torch.testing.assert_close(y.double(), exact * gate, rtol=5e-6, atol=0)  # far below 0 too
    torch.testing.assert_close(slope.double(), gate + exact * density, rtol=0, atol=4e-7)


def test_a_cache_that_cannot_be_written_costs_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels._library() is None:
        pytest.skip("no compiler on this machine")
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/self")
    assert native.build(kernels._SOURCE) is not None


def test_sums_of_squares_are_those_of_float64() -> None:
    tensors = [torch.randn(n) for n in (0, 1, 31, 8192, 8193, 40_000)] + [torch.randn(50, 60).T]
    expected = sum(float(t.double().square().sum()) for t in tensors)
    assert float(kernels.sum_of_squares(tensors)) == pytest.approx(expected, rel=1e-14)


needs_compiler = pytest.mark.skipif(kernels._library() is None, reason="no compiler here")


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("n_rows", "width"), [(1, 16), (37, 48), (70, 176)])
def test_an_rmsnorm_and_its_gradients(n_rows: int, width: int, dtype: torch.dtype) -> None:
    x, weight, gradient = (
        torch.randn(n_rows, width) * 3,
        torch.randn(width),
        torch.randn(n_rows, width),
    )
    found, expected = [], []
    for results, use in ((found, kernels.rms_norm), (expected, norm_of_torch)):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = use(*leaves, 1e-5, dtype)
        results += [y.detach(), *torch.autograd.grad(y, leaves, gradient.to(dtype))]
    assert found[0].dtype == dtype
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def norm_of_torch(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return torch.nn.functional.rms_norm(x, weight.shape, weight, eps).to(dtype)


def test_which_norms_are_torchs() -> None:
    weight = torch.ones(24)
    assert not kernels.can_normalize(torch.ones(2, 24, requires_grad=True), weight)
    assert not kernels.can_normalize(torch.ones(2, 16), torch.ones(16))  # has no gradient
    x = torch.ones(2, 16, requires_grad=True, dtype=torch.bfloat16)
    assert not kernels.can_normalize(x, torch.ones(16, dtype=torch.bfloat16))


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [1, 5, 16, 97, 4099])
def test_losses_and_what_overwrites_the_logits(V: int, dtype: torch.dtype) -> None:
    logits = (torch.randn(7, V, generator=torch.Generator().manual_seed(V)) * 10).to(dtype)
    targets = torch.arange(7) % V
    targets[3] = loss.IGNORED
    if V > 20:
        logits[:, -3:] = -math.inf  # as padding has
    exact = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    expected.sum().backward()
    untouched = logits.clone()
    found = kernels.losses(logits, targets.data_ptr(), False)
    assert found is not None
    torch.testing.assert_close(found, expected.detach().float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(logits, untouched)
    again = kernels.losses(logits, targets.data_ptr(), True)
    assert again is not None and torch.equal(again, found)
    assert exact.grad is not None
    rounded = exact.grad.to(dtype)
    # A sum near one is rounded, and so is what is left when one is taken from it.
    rtol, atol = 2e-6 if dtype == torch.float32 else 1e-2, 2 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(logits, rounded, rtol=rtol, atol=atol)
    assert logits[3].eq(0).all()
    if V > 20:
        assert logits[:, -3:].eq(0).all()


@needs_compiler
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_losses_of_what_is_not_finite_are_not(bad: float) -> None:
    for place in (0, 20, 49):
        logits = torch.zeros(2, 50)
        logits[1, place] = bad
        targets = torch.tensor([1, 20])
        found = kernels.losses(logits, targets.data_ptr(), True)
        assert found is not None and not found.isnan()[0] and found.isnan()[1], place


@needs_compiler
def test_small_logits_keep_their_digits_beside_a_large_shift() -> None:
    logits, targets = torch.randn(3, 40), torch.arange(3)
    there = kernels.losses(logits, targets.data_ptr(), False)
    moved = kernels.losses(logits + 4096, targets.data_ptr(), False)
    assert there is not None and moved is not None
    torch.testing.assert_close(moved, there, rtol=0, atol=3e-3)


@needs_compiler
def test_a_target_that_is_no_token_reads_nothing_and_has_no_loss() -> None:
    targets = torch.tensor([3, 1 << 40, -7])
    found = kernels.losses(torch.zeros(3, 50), targets.data_ptr(), True)
    assert found is not None and found.isnan().tolist() == [False, True, True]
