"""Our kernels: what torch computes, and the same sums alone and among others."""

import shutil
import sys

import pytest
import torch

from gptcli.config import ModelConfig
from gptcli.generation import native
from gptcli.generation.decode import Rows
from gptcli.generation.step import one_call
from gptcli.model import GPT, KVCache

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("cc") is None, reason="no compiler here"
)


def make_model(**changes: object) -> GPT:
    shape = {"n_layer": 1, "n_head": 4, "n_embd": 128, "block_size": 200, **changes}
    model = GPT(ModelConfig(**shape, vocab_size=300))
    model.init_weights(1)
    return model.eval()


def test_they_compile_where_there_is_a_compiler() -> None:
    assert native.library() is not None


@pytest.mark.parametrize("head_size", [16, 32, 48, 64, 128, 256])
@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("kept", [torch.float32, torch.float16], ids=str)
@torch.no_grad()
def test_one_token_attends_as_torch_does(
    head_size: int, n_kv_head: int, offset: bool, kept: torch.dtype
) -> None:
    model = make_model(
        n_embd=4 * head_size, n_kv_head=n_kv_head, position="rope", key_offset=offset
    )
    for parameter in model.parameters():
        parameter.mul_(3)
    step = one_call(model)
    assert step is not None
    draw = torch.Generator().manual_seed(head_size)
    ours, theirs = KVCache(200, dtype=kept), KVCache(200, dtype=kept)
    # Sums that differ in their last bit may be rounded to two neighbors in float16.
    of_logits, of_stored = (2e-5, 1e-5) if kept == torch.float32 else (1e-3, 2e-3)
    for n_new in (130, *[1] * 40):
        tokens = torch.randint(300, (2, n_new), generator=draw)
        found = (model.next_logits if n_new > 1 else step)(tokens, ours)
        expected = model.next_logits(tokens, theirs)
        size = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=of_logits * size)
        stored = ours.layers[0]
        assert stored.dtype == kept
        torch.testing.assert_close(stored, theirs.layers[0], rtol=of_stored, atol=1e-4)


@pytest.mark.parametrize("extras", [{}, {"key_offset": True, "position": "rope", "n_kv_head": 2}])
@torch.no_grad()
def test_logits_have_the_same_bits_alone_and_among_others(extras: dict[str, object]) -> None:
    model = make_model(**extras, n_layer=2)
    step = one_call(model)
    assert step is not None
    draw = torch.Generator().manual_seed(1)
    texts = [torch.randint(300, (n,), generator=draw).tolist() for n in (1, 5, 30, 100, 7)]
    rows = Rows(model)
    alone = []
    for text in texts:
        tokens, cache = torch.tensor([text]), KVCache(200)
        rows._fastest(tokens)(tokens, cache)
        alone.append(step(torch.tensor([[9]]), cache)[0])
    for at, text in enumerate(texts):
        _, read = rows._read([text])
        rows._reserve(at + 1, read)
        rows._place(at, read)
    rows.rows = [None] * len(texts)
    rows._use_rows()
    rows._cache.position = torch.tensor([[len(text)] for text in texts])
    rows._cache.length = 100
    together = step(torch.tensor([[9]] * len(texts)), rows._cache)
    for one, among in zip(alone, together, strict=True):
        assert torch.equal(one, among)
