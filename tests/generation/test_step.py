"""The step in one call of step.c beside the model's own, operation by operation."""

from typing import Any

import pytest
import torch

from gptcli.config import GenerateConfig, ModelConfig
from gptcli.config.model import LoraConfig
from gptcli.generation import native
from gptcli.generation.decode import Row, Rows
from gptcli.generation.step import Step, one_call
from gptcli.generation.weights import prepare_for_decoding
from gptcli.model import GPT, KVCache

pytestmark = pytest.mark.skipif(native.library() is None, reason="there is no C compiler here")

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)


def tolerance(dtype: torch.dtype) -> float:
    """Return how far apart logits may be, as a part of the largest.

    What int8 weights multiply is rounded to 16 bits: numbers that differ in float32's last bit may
    become neighbours there.
    """
    return 2e-4 if dtype == torch.int8 else 2e-5


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


def make_model(dtype: torch.dtype = torch.float32, **changes: Any) -> GPT:
    """Return a model that step.c knows, with weights of a precision."""
    shape = {"n_layer": 2, "n_head": 3, "n_embd": 192, "block_size": 24, "vocab_size": 264}
    model = GPT(ModelConfig(**(shape | changes)), 259)
    model.init_weights(4)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    int8 = dtype == torch.int8
    prepare_for_decoding(model.eval(), None if int8 else dtype, int8=int8)
    return model


def in_one_call(model: GPT) -> Step:
    """Return the step of a model by step.c."""
    step = one_call(model)
    assert step is not None, "the step is not taken in one call"
    return step


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_step_in_one_call_is_that_of_the_model(shape: str, dtype: torch.dtype) -> None:
    model = make_model(dtype, **SHAPES[shape])
    tokens = torch.randint(0, 259, (3, 24), generator=torch.Generator().manual_seed(2))
    logits = []
    for step in (in_one_call(model), model.next_logits):
        cache = KVCache(24)
        steps = [model.next_logits(tokens[:, :5], cache)]
        steps += [step(tokens[:, at : at + 1], cache) for at in range(5, 24)]
        assert cache.length == 24
        logits.append(torch.stack(steps))
    atol = tolerance(dtype) * float(logits[1].abs().max())
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_row_is_the_same_alone_and_among_others(shape: str, dtype: torch.dtype) -> None:
    model = make_model(dtype, **SHAPES[shape])
    step = in_one_call(model)
    tokens = torch.randint(0, 259, (11, 20), generator=torch.Generator().manual_seed(3))
    together = KVCache(24, dtype=step.cache_dtype(11))
    model.next_logits(tokens[:, :4], together)
    rows = [step(tokens[:, at : at + 1], together) for at in range(4, 20)]
    alone = KVCache(24, 4, [layer[7:8].clone() for layer in together.layers], tokens[7:8, 3:4])
    for stored in alone.layers:
        stored[:, :, 5:] = 0  # half of an offset key waits at 4
    for at, logits in enumerate(rows, 4):
        assert torch.equal(step(tokens[7:8, at : at + 1], alone)[0], logits[7])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_prompt_in_one_call_is_read_as_by_the_model_and_as_token_by_token(
    shape: str, dtype: torch.dtype
) -> None:
    model = make_model(dtype, **SHAPES[shape])
    step = in_one_call(model)
    tokens = torch.randint(0, 259, (1, 24), generator=torch.Generator().manual_seed(5))
    for n in (1, 2, 19, 23):
        whole, slow, alone = KVCache(24), KVCache(24), KVCache(24)
        logits, expected = step(tokens[:, :n], whole), model.next_logits(tokens[:, :n], slow)
        atol = tolerance(dtype) * float(expected.abs().max())
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=atol)
        single = [step(tokens[:, at : at + 1], alone) for at in range(n)][-1]
        assert torch.equal(logits, single)
        for stored, other in zip(whole.layers, alone.layers, strict=True):
            assert torch.equal(stored, other)
        following = tokens[:, n : n + 1]
        expected = model.next_logits(following, slow)
        torch.testing.assert_close(step(following, whole), expected, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_keys_and_values_have_float16_where_its_range_is_enough(dtype: torch.dtype) -> None:
    model, config = make_model(dtype, **EXTRAS), GenerateConfig(temperature=0, max_new_tokens=8)
    rows = Rows(model)
    rows.join([Row([1, 2, 3], config, (), seed=0)])
    for _ in range(8):
        rows.step()
    kept = torch.float16 if dtype in (torch.float16, torch.int8) else torch.float32
    assert {stored.dtype for stored in rows._cache.layers} == {kept}
    exact = KVCache(24)
    expected = model.next_logits(torch.tensor([rows.rows[0].tokens]), exact)
    error = (rows._next_logits() - expected).abs().max() / expected.abs().max()
    assert error < (2e-5 if dtype == torch.float32 else 1e-3)
    while len(rows.rows) <= 36:  # more than a call takes are left to torch, which takes float32
        rows.join([Row([4, 5], config, (), seed=0, number=len(rows.rows) + n) for n in range(3)])
        is_many = len(rows.rows) > 32
        assert rows._cache.layers[0].dtype == (torch.float32 if is_many else kept)
    assert (rows._next_logits()[0] - expected[0]).abs().max() < 2e-2 * expected.abs().max()
    while rows.rows:
        assert rows._cache.layers[0].dtype == torch.float32
        rows.leave(rows.rows[-1])
    rows.join([Row([1, 2, 3], config, (), seed=0)])
    assert rows._cache.layers[0].dtype == kept


@torch.no_grad()
def test_many_rows_take_the_products_of_matrices() -> None:
    model, config = make_model(), GenerateConfig(temperature=0)
    rows, n = Rows(model), 40
    rows.join([Row([1, 2], config, (), seed=0, number=number) for number in range(n)])
    cache = KVCache(8)
    model.next_logits(torch.tensor([[1, 2]] * n), cache)
    last = torch.tensor([row.tokens[-1:] for row in rows.rows])
    expected = model.next_logits(last, cache)
    atol = 2e-5 * float(expected.abs().max())
    torch.testing.assert_close(rows._next_logits(), expected, rtol=1e-4, atol=atol)
    assert in_one_call(model).few < n


def test_a_model_that_is_trained_decodes_in_one_call_too() -> None:
    model = make_model()
    step = in_one_call(model)
    cache = KVCache(24)
    with torch.no_grad():
        model.next_logits(torch.tensor([[1, 2]]), cache)
        before = step(torch.tensor([[3]]), cache)
        for parameter in model.parameters():
            parameter.mul_(1.5)  # in place, as the optimizer's update
        cache.length = 2
        assert not torch.equal(step(torch.tensor([[3]]), cache), before)


def test_adapters_and_other_precisions_are_left_to_torch() -> None:
    shape = ModelConfig(n_layer=1, n_head=2, n_embd=64, block_size=8, vocab_size=64)
    assert one_call(GPT(shape)) is not None
    assert one_call(GPT(shape).bfloat16()) is None
    assert one_call(GPT(shape.model_copy(update={"lora": LoraConfig(rank=2)}))) is None
