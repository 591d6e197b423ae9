"""Two networks on one text: the difference, and how sure it is."""

import math

import numpy as np
import pytest

from gptcli.evaluation import Evaluation
from gptcli.evaluation.compare import (
    mean_and_margin,
    paired_difference,
    spans_of_bytes,
    student_t,
)
from gptcli.evaluation.metrics import SpanSums


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
