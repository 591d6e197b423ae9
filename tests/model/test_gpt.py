"""The network against Hugging Face's GPT-2, its cache, and its variants."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gptcli.config import ModelConfig
from gptcli.model import GPT, KVCache
from gptcli.model.loss import IGNORED

VARIANTS = {
    "gpt2": {},
    "llama": {
        "norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False,
        "tie_embeddings": False, "n_kv_head": 2,
    },
    "qwen": {"norm": "rmsnorm", "position": "rope", "qk_norm": True, "bias": False,
             "qkv_bias": True, "n_kv_head": 1},
    "speedrun": {"norm": "rmsnorm", "position": "rope", "mlp": "relu2", "bias": False},
}  # fmt: skip


def make(**changes: object) -> GPT:
    """Return an initialised tiny network in evaluation mode."""
    shape = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24, "vocab_size": 61}
    model = GPT(ModelConfig(**{**shape, **changes}))
    model.init_weights(1)
    return model.eval()


def load_hugging_face(model: GPT, theirs: GPT2LMHeadModel) -> None:
    """Copy weights by name; GPT-2 stores its projections as (in, out)."""
    weights = theirs.state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            weight = weights[name if name == "lm_head.weight" else f"transformer.{name}"]
            is_projection = name.split(".")[-2] in ("c_attn", "c_proj", "c_fc")
            parameter.copy_(weight.t() if is_projection and weight.dim() == 2 else weight)


@pytest.mark.parametrize(
    ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"),
    [(1, 1, 16, 8, 50), (2, 2, 32, 16, 97), (3, 4, 64, 33, 97), (4, 12, 96, 64, 1000)],
)
def test_logits_equal_those_of_transformers(
    n_layer: int, n_head: int, n_embd: int, block_size: int, vocab_size: int
) -> None:
    torch.manual_seed(0)
    shape = {"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "vocab_size": vocab_size}
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    theirs = GPT2LMHeadModel(GPT2Config(**shape, **tokens, n_positions=block_size)).eval()
    # Away from their initialisation, where biases are zero and norms one.
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = GPT(ModelConfig(**shape, block_size=block_size)).eval()
    load_hugging_face(ours, theirs)
    tokens_in = torch.randint(vocab_size, (3, block_size))
    with torch.no_grad():
        assert (ours(tokens_in).logits - theirs(tokens_in).logits).abs().max() < 1e-4


def test_loss_equals_that_of_transformers() -> None:
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 97}
    theirs = GPT2LMHeadModel(
        GPT2Config(**shape, n_positions=16, bos_token_id=0, eos_token_id=0)
    ).eval()
    ours = GPT(ModelConfig(**shape, block_size=16)).eval()
    load_hugging_face(ours, theirs)
    rows = torch.randint(97, (3, 16))
    with torch.no_grad():
        expected = theirs(rows, labels=rows).loss * 3 * 15
        loss = ours(rows[:, :-1], rows[:, 1:]).loss
    assert torch.allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_logits_equal_uncached_ones(variant: str) -> None:
    model = make(**VARIANTS[variant])
    tokens = torch.randint(61, (2, 24))
    cache = KVCache(24)
    with torch.no_grad():
        whole = model(tokens).logits
        parts = [
            model(tokens[:, :7], cache=cache).logits,
            model(tokens[:, 7:12], cache=cache).logits,
        ]
        parts += [model(tokens[:, i : i + 1], cache=cache).logits for i in range(12, 24)]
    assert cache.length == 24
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_token_sees_a_later_one(variant: str) -> None:
    model = make(**VARIANTS[variant])
    tokens = torch.randint(61, (1, 24))
    changed = tokens.clone()
    changed[0, 15:] = (changed[0, 15:] + 1) % 61
    with torch.no_grad():
        assert torch.equal(model(tokens).logits[:, :15], model(changed).logits[:, :15])
        assert not torch.equal(model(tokens).logits[:, 15:], model(changed).logits[:, 15:])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_learns(variant: str) -> None:
    model = make(**VARIANTS[variant]).train()
    tokens = torch.randint(61, (2, 24))
    model(tokens, tokens.roll(-1, 1)).loss.backward()
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []


def test_ignored_targets_do_not_count() -> None:
    model = make()
    tokens = torch.randint(61, (2, 24))
    targets = tokens.roll(-1, 1)
    masked = targets.clone()
    masked[:, :20] = IGNORED
    with torch.no_grad():
        logits = model(tokens).logits
        expected = -logits.log_softmax(-1)[:, 20:].gather(2, targets[:, 20:, None]).sum()
        assert torch.allclose(model(tokens, masked).loss, expected, rtol=1e-5)


def test_weights_are_a_function_of_the_seed() -> None:
    one, same, other = make(), make(), make()
    other.init_weights(2)
    torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.wte.weight, other.wte.weight)


def test_initial_spread_is_that_of_gpt2() -> None:
    model = make(n_layer=8, n_embd=128)
    assert abs(float(model.wte.weight.detach().std()) - 0.02) < 1e-3
    joining = model.h[0].mlp.c_proj.weight.detach()
    assert abs(float(joining.std()) - 0.02 / 4) < 5e-4
    assert not model.h[0].attn.c_attn.bias.any()


def test_initial_spread_follows_the_width_and_the_head_can_begin_at_zero() -> None:
    model = make(init_std="width", zero_init_head=True, tie_embeddings=False, n_embd=128)
    assert float(model.wte.weight.detach().std()) == pytest.approx(0.58 / 128**0.5, rel=0.03)
    assert not model.lm_head.weight.any()
    narrow = make(init_std=0.01, n_layer=8, n_embd=128)
    assert float(narrow.h[0].mlp.c_fc.weight.detach().std()) == pytest.approx(0.01, rel=0.03)
    joining = narrow.h[0].mlp.c_proj.weight.detach()
    assert float(joining.std()) == pytest.approx(0.01 / 4, rel=0.03)


def test_a_tied_head_is_counted_once() -> None:
    tied, untied = make(), make(tie_embeddings=False)
    assert untied.n_params() - tied.n_params() == 61 * 32


def test_gpt2_has_124_million_parameters() -> None:
    with torch.device("meta"):
        assert GPT(ModelConfig(vocab_size=50257)).n_params() == 124_439_808
