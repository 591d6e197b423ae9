"""Sampling: what may be drawn, keyed draws, sliding past the context, stop strings."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptcli.config import Config, GenerateConfig, ModelConfig, TokenizerConfig
from gptcli.device import compute
from gptcli.errors import ConfigError
from gptcli.generation import TextStream, candidates, draw, encode_prompt, stream
from gptcli.model import GPT
from gptcli.tokenizers import Tokenizer, make_tokenizer

CPU = compute(Config(device="cpu", dtype="float32"))
LOGITS = torch.tensor([2.0, 0.5, 3.0, -1.0, 1.0])


def byte_tokenizer() -> Tokenizer:
    """Return the tokenizer that needs no text."""
    return make_tokenizer(TokenizerConfig(name="bytes"), lambda: [])


def make_model(vocab_size: int = 257) -> GPT:
    """Return a network with decided opinions."""
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16}
    model = GPT(ModelConfig(**shape, vocab_size=vocab_size))
    model.init_weights(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    return model.eval()


def sample(model: GPT, prompt: list[int], config: GenerateConfig, **key: int) -> list[int]:
    """Return the drawn ids."""
    key = {"eot": 256, "n_tokens": 257, "seed": 1, **key}
    return list(stream(model, prompt, config, CPU, **key))


def test_top_k_keeps_the_likeliest() -> None:
    ids, probs = candidates(LOGITS, GenerateConfig(top_k=2))
    assert ids.tolist() == [2, 0]
    assert float(probs.sum()) == pytest.approx(1)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    probs = torch.softmax(LOGITS, 0).sort(descending=True).values
    just_two = float(probs[:2].sum())
    ids, _ = candidates(LOGITS, GenerateConfig(temperature=1, top_p=just_two - 1e-4))
    assert ids.tolist() == [2, 0]
    ids, _ = candidates(LOGITS, GenerateConfig(temperature=1, top_p=just_two + 1e-4))
    assert ids.tolist() == [2, 0, 4]


def test_min_p_is_relative_to_the_likeliest() -> None:
    ids, _ = candidates(LOGITS, GenerateConfig(temperature=1, min_p=0.3))
    assert ids.tolist() == [2, 0]  # e^-1 = 0.37 stays, e^-2 = 0.14 goes


def test_temperature_sharpens_and_flattens() -> None:
    cold = candidates(LOGITS, GenerateConfig(temperature=0.1))[1][0]
    warm = candidates(LOGITS, GenerateConfig(temperature=10))[1][0]
    assert float(cold) > 0.99 and float(warm) < 0.3


def test_temperature_zero_takes_the_likeliest() -> None:
    assert draw(LOGITS, GenerateConfig(temperature=0), 0.999) == 2


def test_draws_follow_the_distribution() -> None:
    config = GenerateConfig(temperature=1)
    n = 4000
    drawn = torch.bincount(
        torch.tensor([draw(LOGITS, config, (i + 0.5) / n) for i in range(n)]), minlength=5
    )
    assert torch.allclose(drawn / n, torch.softmax(LOGITS, 0), atol=1e-3)


@given(st.floats(0, 1, exclude_max=True))
def test_every_uniform_number_draws_a_candidate(uniform: float) -> None:
    config = GenerateConfig(temperature=1, top_k=3, top_p=0.9)
    assert draw(LOGITS, config, uniform) in candidates(LOGITS, config)[0].tolist()


def test_a_sample_is_a_function_of_seed_and_index() -> None:
    model, config = make_model(), GenerateConfig(max_new_tokens=12, temperature=1.5)
    one = sample(model, [1, 2], config, seed=7, sample=0)
    torch.manual_seed(1)
    assert sample(model, [1, 2], config, seed=7, sample=0) == one
    assert sample(model, [1, 2], config, seed=8, sample=0) != one
    assert sample(model, [1, 2], config, seed=7, sample=1) != one


def test_greedy_decoding_equals_recomputing_everything() -> None:
    model, config = make_model(), GenerateConfig(max_new_tokens=10, temperature=0)
    drawn = sample(model, [5, 6, 7], config, eot=-1)
    tokens = [5, 6, 7]
    with torch.no_grad():
        for _ in range(10):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1, :257].argmax()))
    assert drawn == tokens[3:]


def test_past_the_context_the_later_half_is_read_again() -> None:
    model, config = make_model(), GenerateConfig(max_new_tokens=40, temperature=0)
    drawn = sample(model, [5, 6, 7], config, eot=-1)
    tokens, seen = [5, 6, 7], 0
    with torch.no_grad():
        for _ in range(40):
            if len(tokens) - seen > 16:
                seen = len(tokens) - 8
            logits = model(torch.tensor([tokens[seen:]])).logits[0, -1, :257]
            tokens.append(int(logits.argmax()))
    assert drawn == tokens[3:]
    assert len(drawn) == 40


def test_a_prompt_may_fill_the_context() -> None:
    config = GenerateConfig(max_new_tokens=3, temperature=0)
    assert len(sample(make_model(), list(range(16)), config, eot=-1)) == 3


def test_end_of_text_ends_it_and_is_not_yielded() -> None:
    model, config = make_model(), GenerateConfig(max_new_tokens=10, temperature=0)
    drawn = sample(model, [5], config, eot=-1)
    eot = drawn[3]
    assert sample(model, [5], config, eot=eot) == drawn[: drawn.index(eot)]


def test_padded_rows_of_the_vocabulary_are_never_drawn() -> None:
    model = make_model(vocab_size=320)
    with torch.no_grad():
        model.wte.weight[257:] *= 50
    drawn = sample(model, [5], GenerateConfig(max_new_tokens=12, temperature=2), eot=-1)
    assert max(drawn) < 257


def test_a_prompt_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the prompt has 17 tokens, .* holds 16"):
        encode_prompt(byte_tokenizer(), "x" * 17, 16)
    assert encode_prompt(byte_tokenizer(), None, 16) == [256]
    assert encode_prompt(byte_tokenizer(), "", 16) == [256]


def texts(
    ids: bytes, limit: int = 1000, stop: tuple[str, ...] = ()
) -> tuple[list[str], TextStream]:
    """Return the pieces of a byte stream and the stream after it ended."""
    config = GenerateConfig(max_new_tokens=limit, stop=list(stop))
    found = TextStream(iter(ids), byte_tokenizer(), config)
    return list(found), found


def test_characters_come_whole() -> None:
    pieces, found = texts("a😀é".encode())
    assert pieces == ["a", "😀", "é"]
    assert found.text == "a😀é" and found.n_tokens == 7 and found.finish_reason == "stop"


def test_an_unfinished_character_becomes_a_replacement() -> None:
    assert texts("a😀".encode()[:-1])[1].text == "a\ufffd"


def test_a_full_length_is_named() -> None:
    assert texts(b"abc", limit=3)[1].finish_reason == "length"


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        (b"one END two", ("END",), "one "),
        (b"one EN END", ("END",), "one EN "),
        (b"EEND", ("END",), "E"),
        (b"abcd", ("cd", "bc"), "a"),
        (b"aaab", ("aab",), "a"),
        (b"no stop here", ("xyz",), "no stop here"),
        (b"ends with EN", ("END",), "ends with EN"),
        ("caf\u00e9!".encode(), ("\u00e9",), "caf"),
    ],
)
def test_text_ends_before_the_first_stop_string(
    text: bytes, stop: tuple[str, ...], expected: str
) -> None:
    pieces, found = texts(text, stop=stop)
    assert found.text == "".join(pieces) == expected


@given(
    st.text(alphabet="ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3)
)
def test_stop_strings_cut_where_searching_the_whole_text_would(text: str, stop: list[str]) -> None:
    _, found = texts(text.encode(), stop=tuple(stop))
    # The stream stops at the first moment any stop string is complete.
    ends = [(end, start) for end in range(1, len(text) + 1) for s in stop
            if (start := end - len(s)) >= 0 and text[start:end] == s]  # fmt: skip
    first = min((end for end, _ in ends), default=None)
    cut = min(start for end, start in ends if end == first) if first is not None else len(text)
    assert found.text == text[:cut]


def test_nothing_is_drawn_ahead_of_the_reader() -> None:
    drawn = []

    def ids() -> Iterator[int]:
        for token in b"abc":
            drawn.append(token)
            yield token

    pieces = iter(TextStream(ids(), byte_tokenizer(), GenerateConfig()))
    assert next(pieces) == "a" and drawn == [97]
