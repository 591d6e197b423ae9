"""Which parameters decay, and which go where."""

import pytest
import torch

from gptcli.config import ModelConfig, OptimConfig
from gptcli.errors import CheckpointError
from gptcli.model import GPT
from gptcli.training.optim import Optimizer, clip_gradients


def make_model() -> GPT:
    """Return a tiny network with gradients of zero."""
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": 11}
    model = GPT(ModelConfig(**shape))
    model.init_weights(1)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return model


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_only_matrices_decay(name: str) -> None:
    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Optimizer(model, OptimConfig(name=name, weight_decay=0.5), torch.device("cpu"))
    optimizer.step(0.1)
    for parameter_name, parameter in model.named_parameters():
        factor = 0.95 if parameter.dim() >= 2 else 1.0
        assert torch.allclose(parameter, before[parameter_name] * factor), parameter_name


def test_muon_takes_the_matrices_of_the_blocks() -> None:
    model = make_model()
    optimizer = Optimizer(model, OptimConfig(name="muon"), torch.device("cpu"))
    optimizer.step(0.1)
    state = optimizer.state()
    muons = {name for name, kept in state.items() if "momentum_buffer" in kept}
    assert muons == {
        "h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight",
        "h.0.mlp.c_fc.weight", "h.0.mlp.c_proj.weight",
    }  # fmt: skip
    assert state.keys() == dict(model.named_parameters()).keys()


def test_adamw_does_what_the_paper_says() -> None:
    model = make_model()
    weight = model.wte.weight
    weight.grad = torch.full_like(weight, 0.3)
    start = weight.detach().clone()
    config = OptimConfig(weight_decay=0.1, beta1=0.9, beta2=0.95)
    Optimizer(model, config, torch.device("cpu")).step(0.01)
    expected = start * (1 - 0.01 * 0.1) - 0.01 * 0.3 / (0.3 + 1e-8)
    assert torch.allclose(weight, expected, atol=1e-7)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_each_kind_of_parameter_has_its_rate(name: str) -> None:
    shape = {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 8, "vocab_size": 11}
    model = GPT(ModelConfig(**shape, tie_embeddings=False))
    model.init_weights(1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.3)
    rates = {"embed_lr": 0.5, "head_lr": 0.125, "scalar_lr": 0.25}
    config = OptimConfig(name=name, lr=0.1, weight_decay=0, **rates)
    Optimizer(model, config, torch.device("cpu")).step(0.05)  # half of the peak
    own = {"wte.weight": 0.5, "wpe.weight": 0.5, "lm_head.weight": 0.125}
    for parameter_name, parameter in model.named_parameters():
        # AdamW's first step has the size of the rate.
        change = (before[parameter_name] - parameter.detach()).abs().mean()
        is_vector = parameter.dim() == 1
        rate = own.get(parameter_name, 0.25 if is_vector else 0.1)
        if name == "adamw" or is_vector or parameter_name in own:
            assert float(change) == pytest.approx(rate / 2, rel=1e-4), parameter_name


def test_a_rate_does_not_change_how_much_decays() -> None:
    model = make_model()  # its gradients are zero
    before = model.wte.weight.detach().clone()
    config = OptimConfig(lr=0.1, embed_lr=0.8, weight_decay=0.5)
    Optimizer(model, config, torch.device("cpu")).step(0.1)
    assert torch.allclose(model.wte.weight, before * 0.95)


def test_equal_rates_change_no_bit() -> None:
    models = [make_model(), make_model()]
    rates = {"embed_lr": 6e-4, "scalar_lr": 6e-4}
    for model, config in zip(models, (OptimConfig(), OptimConfig(**rates)), strict=True):
        for parameter in model.parameters():
            parameter.grad = torch.sin(torch.arange(parameter.numel())).view(parameter.shape)
        Optimizer(model, config, torch.device("cpu")).step(1.7e-4)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_clipping_scales_to_the_norm_and_reports_it() -> None:
    model = make_model()
    model.wte.weight.grad = torch.full_like(model.wte.weight, 2.0)
    n = model.wte.weight.numel()
    assert clip_gradients(model.parameters(), 1.0) == pytest.approx(2.0 * n**0.5)
    assert float(model.wte.weight.grad.norm()) == pytest.approx(1.0, rel=1e-4)
    assert clip_gradients(model.parameters(), 0) == pytest.approx(1.0, rel=1e-4)
    assert float(model.wte.weight.grad.norm()) == pytest.approx(1.0, rel=1e-4)


def test_state_of_other_parameters_is_refused() -> None:
    optimizer = Optimizer(make_model(), OptimConfig(), torch.device("cpu"))
    with pytest.raises(CheckpointError, match="other parameters"):
        optimizer.load_state({"wte.weight": {"step": torch.zeros(())}})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_multiplies_as_the_run_does(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: set[torch.dtype] = set()

    def orthogonalized(stack: torch.Tensor) -> torch.Tensor:
        used.add(stack.dtype)
        return stack

    monkeypatch.setattr("gptcli.training.muon.orthogonalized", orthogonalized)
    Optimizer(make_model(), OptimConfig(name="muon"), torch.device("cpu"), dtype).step(0.1)
    assert used == {dtype}
