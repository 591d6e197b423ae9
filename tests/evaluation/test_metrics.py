"""Units of text, sums by span, and the chance in a mean and in a difference."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcli.config import TokenizerConfig
from gptcli.evaluation.metrics import (
    Evaluation,
    SpanSums,
    TokenStats,
    mean_and_margin,
    paired_difference,
    spans_of_bytes,
    student_t,
)
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


def scored(nats: np.ndarray, spans: np.ndarray, n_bytes: np.ndarray) -> Evaluation:
    """Return an evaluation of tokens with these losses, spans and bytes."""
    tally = SpanSums(int(spans.max()) + 1)
    tally.add(spans, nats.astype(np.float32), n_bytes, np.ones_like(n_bytes))
    return Evaluation(16, 16, tally)


def two(shift: float, noise: float, seed: int = 0) -> tuple[Evaluation, Evaluation]:
    """Score a text whose passages differ much; the second network needs `shift` nats more."""
    rng = np.random.default_rng(seed)
    spans = np.repeat(np.arange(100), 20)
    n_bytes = rng.integers(1, 9, size=2000)
    hard = np.repeat(rng.normal(4, 1, size=100), 20)
    first = hard + rng.normal(0, noise, size=2000)
    second = hard + shift + rng.normal(0, noise, size=2000)
    return scored(first, spans, n_bytes), scored(second, spans, n_bytes)


def test_what_makes_a_passage_hard_cancels() -> None:
    first, second = two(0.05, 0.2)
    found = paired_difference(first, second)
    assert found.bits_per_byte == pytest.approx(first.bits_per_byte - second.bits_per_byte)
    assert found.is_certain and found.high < 0
    alone = first.standard_error * first.tokens / first.bytes / math.log(2)
    assert found.high - found.low < alone


def test_a_network_does_not_differ_from_itself() -> None:
    first, _ = two(0, 0.2)
    found = paired_difference(first, first)
    assert (found.bits_per_byte, found.low, found.high) == (0, 0, 0) and not found.is_certain


def test_the_interval_holds_the_truth_nineteen_times_of_twenty() -> None:
    missed = sum(paired_difference(*two(0, 0.5, seed)).is_certain for seed in range(400))
    assert 6 <= missed <= 36


def test_the_order_of_the_two_turns_the_sign() -> None:
    first, second = two(0.05, 0.2)
    one, other = paired_difference(first, second), paired_difference(second, first)
    assert one.low == pytest.approx(-other.high) and one.high == pytest.approx(-other.low)


def test_one_span_gives_no_interval() -> None:
    nats, n_bytes = np.ones(10), np.ones(10, dtype=np.int64)
    one = scored(nats, np.zeros(10, dtype=np.int64), n_bytes)
    found = paired_difference(one, one)
    assert math.isnan(found.low) and math.isnan(found.high) and not found.is_certain


def test_spans_are_of_bytes_whatever_the_tokens() -> None:
    coarse = spans_of_bytes(np.full(1000, 256))
    fine = spans_of_bytes(np.ones(256_000, dtype=np.int64))
    assert coarse[-1] == fine[-1] == 255
    assert [int(fine[256 * i + 255]) for i in range(1000)] == coarse.tolist()
    assert spans_of_bytes(np.array([0, 0, 3])).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042), (255, 1.969)],
)
def test_students_quantiles_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert student_t(0.95, freedom) == pytest.approx(quantile, abs=0.002)


def test_a_mean_has_an_interval_from_two_values_on() -> None:
    mean, margin = mean_and_margin([1.0, 2.0, 3.0])
    assert mean == 2.0 and margin == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert mean_and_margin([5.0])[0] == 5.0 and math.isnan(mean_and_margin([5.0])[1])
