"""Rows that join and leave: each text is that drawn alone, whatever grows beside it."""

import random

import pytest
import torch

from gptcli.config import GenerateConfig, ModelConfig
from gptcli.generation import Row, Rows
from gptcli.model import GPT
from support.draws import ids_drawn

EXTRAS = {
    "position": "rope", "bigram_rows": 64, "n_value_embd": 1, "key_offset": True, "n_kv_head": 1,
    "x0_scalars": True, "qk_norm": True,
}  # fmt: skip
SHAPES = {
    "gpt2": {},
    "wide": {"n_head": 2, "n_embd": 64},
    "extras": EXTRAS | {"n_embd": 64},
    "extras, narrow": EXTRAS,
}


def make_model(**changes: object) -> GPT:
    """Return a network with decided opinions."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, **changes}
    model = GPT(ModelConfig(**shape, vocab_size=257))
    model.init_weights(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    return model.eval()


def make_row(draw: random.Random) -> Row:
    """Return a random text to begin."""
    config = GenerateConfig(
        temperature=draw.choice([0, 0.7, 1.0, 1.5]),
        top_k=draw.choice([None, None, 5, 40]),
        top_p=draw.choice([None, None, 0.5, 0.95]),
        min_p=draw.choice([None, None, 0.05]),
        repetition_penalty=draw.choice([1.0, 1.0, 1.3]),
        max_new_tokens=draw.randint(1, 30),
    )
    prompt = [draw.randrange(257) for _ in range(draw.randint(1, 16))]
    return Row(prompt, config, (256,), seed=draw.randrange(5), number=draw.randrange(4))


def alone(model: GPT, row: Row) -> list[int]:
    """Return what `gpt generate` would draw."""
    return ids_drawn(model, row.tokens, row.config, row.number, ends=row.ends, seed=row.seed)


def run_all(model: GPT, waiting: list[Row], draw: random.Random) -> dict[Row, list[int]]:
    """Let rows join at random times; return what each has drawn."""
    rows, texts = Rows(model), {row: [] for row in waiting}
    waiting = list(waiting)
    while waiting or rows.rows:
        drawn = []
        if waiting and (not rows.rows or (len(rows.rows) < 7 and draw.random() < 0.5)):
            drawn = rows.join([waiting.pop()])
        elif rows.rows:
            drawn = rows.step()
        for row, token, _, _ in drawn:
            if token is not None:
                texts[row].append(token)
            if token is None or row.n_drawn == row.config.max_new_tokens:
                rows.leave(row)
    return texts


@pytest.mark.parametrize("shape", SHAPES)
def test_texts_that_join_and_leave_are_those_of_generate(shape: str) -> None:
    model, draw = make_model(**SHAPES[shape]), random.Random(1)
    waiting = [make_row(draw) for _ in range(120)]
    expected = {row: alone(model, row) for row in waiting}
    assert run_all(model, waiting, draw) == expected


def test_samples_of_one_prompt_read_it_once_and_are_those_of_generate() -> None:
    model, config = make_model(), GenerateConfig(max_new_tokens=9, temperature=1.2)
    rows = Rows(model)
    some = [Row([1, 2, 3], config, (), seed=3, number=number) for number in range(5)]
    drawn = rows.join(some)
    for _ in range(8):
        drawn += rows.step()
    for row in some:
        assert ids_drawn(model, [1, 2, 3], config, row.number, seed=3) == row.tokens[3:]


def test_log_probabilities_come_with_the_likeliest_tokens() -> None:
    model = make_model()
    row = Row([1, 2], GenerateConfig(temperature=0), (), seed=1, n_top=3)
    [drawn] = Rows(model).join([row])
    with torch.no_grad():
        logprobs = model(torch.tensor([[1, 2]])).logits[0, -1].log_softmax(-1)
    values, ids = logprobs.topk(3)
    assert drawn.token == int(ids[0])
    assert drawn.logprob == pytest.approx(float(values[0]))
    assert [token for token, _ in drawn.top] == ids.tolist()
    assert [value for _, value in drawn.top] == pytest.approx(values.tolist())
