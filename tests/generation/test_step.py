"""The step in one call of step.c beside the model's own, operation by operation."""

from typing import Any

import pytest
import torch

from gptcli.config import ModelConfig
from gptcli.generation import native
from gptcli.generation.weights import prepare_for_decoding
from gptcli.model import GPT, KVCache

pytestmark = pytest.mark.skipif(native.library() is None, reason="there is no C compiler here")

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
GPT2: dict[str, Any] = {}
MODERN = {"position": "rope", "norm": "rmsnorm", "qk_norm": True, "mlp": "swiglu", "n_kv_head": 1,
          "tie_embeddings": False, "bias": False}  # fmt: skip
EXTRAS = MODERN | {"mlp": "relu2", "bigram_rows": 64, "n_value_embd": 1, "key_offset": True,
                   "x0_scalars": True}  # fmt: skip
SHAPES = {
    "gpt2": GPT2, "without biases": {"bias": False}, "nanogpt": {"mlp": "gelu_erf"},
    "modern": MODERN, "layernorm and rope": {"position": "rope", "qk_norm": True},
    "extras": EXTRAS,
}  # fmt: skip


def models(dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[GPT, GPT]:
    """Return a model that decodes in one call, and the same that does not."""
    shape = {"n_layer": 2, "n_head": 3, "n_embd": 192, "block_size": 24, "vocab_size": 264}
    model = GPT(ModelConfig(**(shape | changes)), 259)
    model.init_weights(4)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    other = GPT(model.config, 259)
    other.load_state_dict(model.state_dict())
    with torch.random.fork_rng():
        int8 = dtype == torch.int8
        prepare_for_decoding(model.eval(), None if int8 else dtype, int8=int8)
        prepare_for_decoding(other.eval(), None if int8 else dtype, int8=int8)
    assert "next_logits" in vars(model), "the step is not taken in one call"
    del other.next_logits
    return model, other


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_in_one_call_is_that_of_the_model(shape: str, dtype: torch.dtype) -> None:
    one_call, by_parts = models(dtype, **SHAPES[shape])
    tokens = torch.randint(0, 259, (3, 24), generator=torch.Generator().manual_seed(2))
    logits = []
    for model in (one_call, by_parts):
        cache = KVCache(24)
        steps = [model.next_logits(tokens[:, :5], cache)]
        steps += [model.next_logits(tokens[:, at : at + 1], cache) for at in range(5, 24)]
        assert cache.length == 24
        logits.append(torch.stack(steps))
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=2e-5 * logits[1].abs().max())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_is_the_same_alone_and_among_others(shape: str) -> None:
    model, _ = models(**SHAPES[shape])
    tokens = torch.randint(0, 259, (11, 20), generator=torch.Generator().manual_seed(3))
    together = KVCache(24)
    model.next_logits(tokens[:, :4], together)
    rows = [model.next_logits(tokens[:, at : at + 1], together) for at in range(4, 20)]
    alone = together.of_rows([7])
    for stored in alone.layers:
        stored[:, :, 5:] = 0  # half of an offset key waits at 4
    alone.length = 4
    for at, logits in enumerate(rows, 4):
        assert torch.equal(model.next_logits(tokens[7:8, at : at + 1], alone)[0], logits[7])


def test_many_rows_take_the_products_of_matrices() -> None:
    model, by_parts = models()
    tokens = torch.randint(0, 259, (40, 3), generator=torch.Generator().manual_seed(3))
    caches = KVCache(8), KVCache(8)
    for at in range(3):
        one, other = (m.next_logits(tokens[:, at : at + 1], cache)
                      for m, cache in zip((model, by_parts), caches, strict=True))  # fmt: skip
        assert torch.equal(one, other)
