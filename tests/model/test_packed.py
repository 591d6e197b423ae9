"""Several texts in a row: none sees another, and each is computed as if it were alone."""

import warnings

import pytest
import torch

from gptcli.model import GPT
from gptcli.model.loss import IGNORED
from support.models import N_TOKENS, tiny_model, tokens_of

EXTRAS = {"x0_scalars": True, "n_value_embd": 2, "bigram_rows": 97, "key_offset": True}
SHAPES: dict[str, dict[str, object]] = {
    "learned": {"position": "learned"},
    "rope": {"position": "rope", "n_kv_head": 2, "qk_norm": True, "norm": "rmsnorm"},
    "extras": {"position": "rope", "mlp": "relu2", **EXTRAS},
}
LENGTHS = (5, 1, 17, 3, 30, 8)


def make(length: int = 64, **changes: object) -> GPT:
    return tiny_model(**{"n_layer": 2, "block_size": length, **changes})


def starts_of(lengths: tuple[int, ...] = LENGTHS) -> torch.Tensor:
    """Return where the text of each token begins, for texts one after another, (1, T)."""
    ends = torch.tensor(lengths).cumsum(0)
    return torch.repeat_interleave(ends - torch.tensor(lengths), torch.tensor(lengths))[None]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_changing_one_text_changes_no_bit_of_another(shape: dict[str, object]) -> None:
    model, starts, tokens = make(**shape), starts_of().expand(2, -1), tokens_of(2, 64)
    logits = model(tokens, None, starts).logits
    for begin in starts[0].unique().tolist():
        changed, inside = tokens.clone(), starts[0] == begin
        changed[:, inside] = (changed[:, inside] + 7) % N_TOKENS
        found = model(changed, None, starts).logits
        assert torch.equal(found[:, ~inside], logits[:, ~inside])
        assert not torch.equal(found[:, inside], logits[:, inside])


@torch.no_grad()
def test_nor_in_rows_that_attention_reads_in_several_blocks() -> None:
    model, starts, tokens = make(1200), starts_of((900, 300)), tokens_of(1, 1200)
    changed = tokens.clone()
    changed[:, :900] = (changed[:, :900] + 7) % N_TOKENS
    one, other = (model(row, None, starts).logits for row in (tokens, changed))
    assert torch.equal(one[:, 900:], other[:, 900:])


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@torch.no_grad()
def test_each_text_is_computed_as_if_it_were_alone(shape: dict[str, object]) -> None:
    model, starts, tokens = make(**shape), starts_of(), tokens_of(1, 64)
    logits = model(tokens, None, starts).logits
    for begin in starts[0].unique().tolist():
        inside = starts[0] == begin
        assert torch.allclose(logits[:, inside], model(tokens[:, inside]).logits, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_one_text_in_a_row_is_a_plain_row(shape: dict[str, object]) -> None:
    model, tokens = make(**shape), tokens_of(2, 64)
    starts = torch.zeros_like(tokens)
    plain, packed = (model(tokens, tokens.roll(-1), *more).loss for more in ((), (starts,)))
    assert torch.allclose(plain, packed, rtol=1e-5)


@pytest.mark.parametrize("how", ["recompute", "compiled", "bfloat16"])
def test_gradients_are_the_same_however_they_are_computed(how: str) -> None:
    model, tokens, starts = make(**SHAPES["extras"]), tokens_of(1, 64), starts_of()
    targets = tokens.roll(-1).masked_fill(starts % 2 == 0, IGNORED)
    torch.autograd.backward(model(tokens, targets, starts).loss)
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with (
        warnings.catch_warnings(action="ignore"),
        torch.autocast("cpu", torch.bfloat16, enabled=how == "bfloat16"),
    ):
        twin = model.compiled() if how == "compiled" else model
        loss = twin(tokens, targets, starts, recompute=how == "recompute").loss
    torch.autograd.backward(loss)
    for name, parameter in model.named_parameters():
        gap = float((parameter.grad - wanted[name]).norm() / wanted[name].norm())
        assert gap < (0.1 if how == "bfloat16" else 1e-4), name


def test_dropout_does_not_mix_texts() -> None:
    model, tokens, starts = (
        make(**SHAPES["rope"], dropout=0.2).train(),
        tokens_of(1, 64),
        starts_of(),
    )
    inside, found = starts[0] == 0, []
    for shift in (0, 7):
        torch.manual_seed(1)
        changed = torch.where(inside, (tokens + shift) % N_TOKENS, tokens)
        found.append(model(changed, None, starts).logits)
    assert torch.equal(found[0][:, ~inside], found[1][:, ~inside])
