"""Units of text, sums by span, and the chance in a mean."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcli.config import TokenizerConfig
from gptcli.evaluation.metrics import Evaluation, SpanSums, TokenStats
from gptcli.tokenizers import Tokenizer, make_tokenizer


@pytest.fixture(scope="module")
def gpt2() -> Tokenizer:
    """GPT-2's vocabulary."""
    return make_tokenizer(TokenizerConfig(name="gpt2"), lambda: [])


@pytest.fixture(scope="module")
def stats(gpt2: Tokenizer) -> TokenStats:
    return TokenStats(gpt2)


@settings(deadline=None)
@given(st.text(alphabet="ab é\n\t.\u2028\u00a0日", max_size=40))
def test_words_and_bytes_of_the_tokens_are_those_of_the_text(
    gpt2: Tokenizer, stats: TokenStats, text: str
) -> None:
    ids = np.concatenate([[gpt2.eot], gpt2.encode(text)]).astype(np.int64)
    n_bytes, n_words = stats.count(ids[:-1], ids[1:])
    assert int(n_bytes.sum()) == len(text.encode())
    assert int(n_words.sum()) == len(text.encode().split())


def test_a_word_on_both_sides_of_an_end_of_text_is_two(gpt2: Tokenizer) -> None:
    one = gpt2.encode("one").astype(np.int64)
    ids = np.concatenate([one, [gpt2.eot], one])
    _, n_words = TokenStats(gpt2).count(ids[:-1], ids[1:])
    assert n_words.tolist() == [0, 1]


def tallied(nats: list[float], tokens: list[int]) -> Evaluation:
    """Return an evaluation of spans with these sums; every token is two bytes and half a word."""
    tally = SpanSums(len(nats))
    for span, (sum_, n) in enumerate(zip(nats, tokens, strict=True)):
        units = np.full(n, 2), np.arange(n) % 2
        tally.add(np.full(n, span), np.full(n, sum_ / n, dtype=np.float32), *units)
    return Evaluation(16, 16, tally)


def test_units_of_the_result() -> None:
    found = tallied([8.0, 16.0], [4, 4])
    assert (found.tokens, found.bytes, found.words) == (8, 16, 4)
    assert found.loss == 3.0
    assert found.perplexity == pytest.approx(math.exp(3))
    assert found.word_perplexity == pytest.approx(math.exp(6))
    assert found.bits_per_byte == pytest.approx(24 / math.log(2) / 16)


def test_the_standard_error_of_equal_spans_is_that_of_their_means() -> None:
    means = [2.0, 3.0, 2.5, 4.0, 1.0]
    found = tallied([10 * mean for mean in means], [10] * 5)
    assert found.standard_error == pytest.approx(np.std(means, ddof=1) / math.sqrt(5))


def test_one_span_has_no_standard_error() -> None:
    assert math.isnan(tallied([3.0], [5]).standard_error)


def test_the_standard_error_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(400):
        sizes = rng.integers(5, 40, size=60)
        nats = [float(n * 3 + rng.normal(0, math.sqrt(n) + n / 4)) for n in sizes]
        found = tallied(nats, sizes.tolist())
        covered += abs(found.loss - 3) < 1.96 * found.standard_error
    assert 0.91 < covered / 400 < 0.98


def test_a_loss_beyond_floats_has_an_infinite_perplexity() -> None:
    assert tallied([8000.0], [8]).perplexity == math.inf
