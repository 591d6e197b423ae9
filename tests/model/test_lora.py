"""Adapters: zero at first, merged exactly, on the layers that are named."""

import pytest
import torch
from pydantic import ValidationError

from gptcli.config.model import LoraConfig, LoraTarget, ModelConfig
from gptcli.model import GPT
from gptcli.model.lora import init_adapters, is_adapter, merge_adapters


def adapted(**lora: object) -> tuple[GPT, GPT]:
    """Return a network and the same with adapters."""
    shape = ModelConfig(
        init_from="elsewhere", n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=31,
        mlp="swiglu",
    )  # fmt: skip
    base = GPT(shape)
    base.init_weights(1)
    model = GPT(shape.model_copy(update={"lora": LoraConfig.model_validate(lora)}))
    init_adapters(model, 2)
    assert not model.load_state_dict(base.state_dict(), strict=False).unexpected_keys
    return base, model


def logits(model: GPT) -> torch.Tensor:
    found = model(torch.arange(8)[None]).logits
    assert found is not None
    return found


def test_fresh_adapters_change_nothing() -> None:
    base, model = adapted()
    assert torch.equal(logits(model), logits(base))
    names = [name for name, _ in model.named_parameters() if is_adapter(name)]
    assert len(names) == 2 * 2 * 5  # A and B, two blocks, five layers


def test_merging_gives_the_network_that_computes_the_same() -> None:
    base, model = adapted(rank=3, alpha=5.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(0, 0.1)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    layer = "h.1.mlp.c_proj"
    update = 5 / 3 * weights[f"{layer}.lora_B"] @ weights[f"{layer}.lora_A"]
    assert model.config.lora is not None
    found = merge_adapters(weights, model.config.lora)
    assert torch.allclose(found[f"{layer}.weight"], weights[f"{layer}.weight"] + update)
    plain = GPT(base.config)
    plain.load_state_dict(found, strict=False)
    assert (logits(plain) - logits(base)).abs().max() > 1e-2
    assert torch.allclose(logits(plain), logits(model), atol=1e-5)


@pytest.mark.parametrize("targets", [["attn.c_attn"], ["mlp.c_fc", "attn.c_proj"]])
def test_targets(targets: list[LoraTarget]) -> None:
    _, model = adapted(targets=targets)
    found = {name.split(".", 2)[2].rsplit(".", 1)[0] for name, _ in model.named_parameters()
             if is_adapter(name)}  # fmt: skip
    assert found == set(targets)


def test_gradients_reach_the_adapters_alone() -> None:
    _, model = adapted()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    tokens = torch.arange(8)[None]
    torch.autograd.backward(model(tokens, tokens).loss)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == is_adapter(name)


def test_what_cannot_be_adapted() -> None:
    with pytest.raises(ValidationError, match="need weights to adapt"):
        ModelConfig(lora=LoraConfig())
    with pytest.raises(ValidationError, match="only mlp = swiglu"):
        values = ModelConfig().model_dump() | {
            "init_from": "x",
            "lora": {"targets": ["mlp.c_gate"]},
        }
        ModelConfig.model_validate(values)
