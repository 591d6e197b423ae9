"""Weights in few bits: the same network, up to the rounding of what they hold."""

import pytest
import torch
from torch import Tensor

from gptcli.config import GenerateConfig, ModelConfig
from gptcli.errors import ConfigError
from gptcli.generation import Decoding
from gptcli.generation import weights as module
from gptcli.generation.weights import prepare_for_decoding
from gptcli.model import GPT


def make_model() -> GPT:
    """Return a network wide enough for every kernel."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 64, "block_size": 32, "vocab_size": 101}
    model = GPT(ModelConfig(**shape))
    model.init_weights(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model.eval()


TOKENS = torch.randint(0, 101, (2, 9), generator=torch.Generator().manual_seed(0))


def logits(model: GPT) -> Tensor:
    """Return what the network says of two texts."""
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits
    return found


@pytest.mark.parametrize(
    ("dtype", "int8", "error"),
    [(torch.float32, False, 1e-6), (torch.float16, False, 2e-3), (torch.bfloat16, False, 2e-2),
     (torch.float32, True, 5e-2), (torch.bfloat16, True, 5e-2)],
)  # fmt: skip
@pytest.mark.parametrize("rows", [1, 8])
def test_logits_stay_within_the_rounding(
    dtype: torch.dtype, int8: bool, error: float, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LARGE", 0)
    expected, model = logits(make_model()), make_model()
    said = prepare_for_decoding(model, dtype, rows=rows, int8=int8)
    found = logits(model)
    assert float((found - expected).norm() / expected.norm()) < error
    assert ("int8" in said) == int8
    if dtype != torch.float32 or int8:
        assert not torch.equal(found, expected)  # they were exchanged


def test_every_kernel_that_this_torch_has_multiplies_alike() -> None:
    torch.manual_seed(3)
    weight, bias, x = torch.randn(96, 64), torch.randn(96), torch.randn(3, 1, 64)
    expected = torch.nn.functional.linear(x, weight, bias)
    tried = 0
    for dtype, error in ((torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 1e-2)):
        for kernel in module._candidates(dtype):
            try:
                found = kernel.prepare(weight, bias)(x)
            except RuntimeError:
                continue
            assert found.shape == expected.shape
            assert float((found - expected).norm() / expected.norm()) < error, kernel.name
            tried += 1
    for kernel in (module.INT8, module.INT8_PLAIN):
        found = kernel.prepare(weight, bias)(x)
        assert float((found - expected).norm() / expected.norm()) < 2e-2, kernel.name
    assert tried >= 3


def test_a_kernel_that_fails_or_errs_loses_the_race() -> None:
    def failing(weight: Tensor, bias: Tensor | None) -> module.MatmulFn:
        raise RuntimeError("not on this processor")

    plain = module._candidates(torch.float32)[0]
    wrong = module.Kernel("wrong", torch.float32, lambda weight, bias: lambda x: x @ weight.T * 2)
    layers = [torch.nn.Linear(64, 64) for _ in range(4)]
    for order in ([plain, wrong], [wrong, plain]):
        candidates = [module.Kernel("fails", torch.float32, failing), *order]
        assert module._autotune(candidates, layers, 1, torch.zeros(9)) is plain


@pytest.mark.parametrize("shape", [{"n_embd": 36}, {"n_embd": 32, "n_inner": 43}])
def test_int8_of_widths_that_torch_s_kernel_reads_past(shape: dict[str, int]) -> None:
    sizes = {"n_layer": 2, "n_head": 2, "block_size": 32, "vocab_size": 101, **shape}
    model = GPT(ModelConfig(**sizes)).eval()
    model.init_weights(2)
    expected = logits(model)
    assert "widened" in prepare_for_decoding(model, torch.float32, rows=3, int8=True)
    assert float((logits(model) - expected).norm() / expected.norm()) < 5e-2


def test_quantizing_errs_by_half_a_step_at_most() -> None:
    torch.manual_seed(0)
    weight = torch.randn(20, 50) * torch.logspace(-6, 3, 20)[:, None]
    weight[3] = 0
    whole, scales = module.quantize(weight)
    error = (whole * scales.float()[:, None] - weight).abs()
    assert (error <= 0.51 * scales.float()[:, None] + 127 * 2**-8 * scales.float()[:, None]).all()
    assert whole[3].eq(0).all() and whole.abs().max() <= 127


def test_small_networks_decode_in_float32() -> None:
    model = make_model()
    assert prepare_for_decoding(model) == "float32"
    assert torch.equal(logits(model), logits(make_model()))


def test_decoding_with_other_weights_agrees_with_itself() -> None:
    model = make_model()
    prepare_for_decoding(model, torch.float16)
    config = GenerateConfig(max_new_tokens=40, temperature=0)
    found = [drawn.token for drawn in Decoding(model, [3], config, ends=(), seed=1)]
    assert len(found) == 40


def test_int8_is_refused_where_it_is_slower() -> None:
    with torch.device("meta"):
        model = GPT(ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=16, vocab_size=40))
    with pytest.raises(ConfigError, match="int8: it is slower than 16 bits on meta"):
        prepare_for_decoding(model, torch.bfloat16, int8=True)
