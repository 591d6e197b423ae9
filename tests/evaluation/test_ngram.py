"""The Kneser-Ney model against the formula spelled out, gram by gram."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcli.evaluation.baselines import KneserNey

texts = st.lists(st.integers(0, 3), min_size=1, max_size=40)


class Spelled:
    """The same model, with tuples in dictionaries."""

    def __init__(self, tokens: list[int], vocab_size: int, order: int) -> None:
        self.vocab_size, self.order = vocab_size, order
        grams = [[tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
                 for n in range(order + 2)]  # fmt: skip
        self.counts: list[Counter] = [Counter() for _ in range(order + 1)]
        self.counts[order].update(grams[order])
        for n in range(1, order):
            self.counts[n].update(gram[1:] for gram in set(grams[n + 1]))

    def discount(self, n: int, count: int) -> float:
        times = Counter(self.counts[n].values())
        kind = min(count, 3)
        if times[1] and times[kind]:
            y = times[1] / (times[1] + 2 * times[2])
            found = kind - (kind + 1) * y * times[kind + 1] / times[kind]
            if 0 < found <= kind:
                return found
        return {1: 0.5, 2: 1.0, 3: 1.5}[kind]

    def p(self, context: tuple[int, ...], token: int) -> float:
        n = len(context) + 1
        lower = self.p(context[1:], token) if context else 1 / self.vocab_size
        followers = {g: c for g, c in self.counts[n].items() if g[:-1] == context and c}
        if not followers:
            return lower
        total = sum(followers.values())
        count = self.counts[n][(*context, token)]
        kept = count - self.discount(n, count) if count else 0.0
        taken = sum(self.discount(n, c) for c in followers.values())
        return (kept + taken * lower) / total


@given(texts, texts, st.integers(1, 5))
@settings(max_examples=200, deadline=None)
def test_the_model_is_the_formula(train: list[int], text: list[int], order: int) -> None:
    spelled = Spelled(train, 5, order)
    expected = [-math.log(spelled.p(tuple(text[max(0, i - order + 1) : i]), text[i]))
                for i in range(1, len(text))]  # fmt: skip
    model = KneserNey(np.array(train, np.uint16), 5, order)
    assert model.nats(np.array(text, np.uint16)).tolist() == pytest.approx(expected)


@given(texts, texts)
@settings(max_examples=200, deadline=None)
def test_probabilities_of_all_tokens_sum_to_one(train: list[int], context: list[int]) -> None:
    model = KneserNey(np.array(train, np.uint16), 5)
    losses = [model.nats(np.array([*context, token], np.uint16))[-1] for token in range(5)]
    assert sum(math.exp(-loss) for loss in losses) == pytest.approx(1)


def test_more_text_predicts_the_same_kind_better() -> None:
    rng = np.random.default_rng(0)
    words = [rng.integers(0, 50, size=4) for _ in range(20)]
    text = np.concatenate([words[rng.integers(20)] for _ in range(3000)]).astype(np.uint16)
    few, many = (KneserNey(text[:n], 50).nats(text[-2000:]).mean() for n in (200, 8000))
    assert many < few < math.log(50)
    entropy = math.log(20) / 4  # the first token of a word decides the rest
    assert entropy < many < 1.2 * entropy + 0.05


def test_a_text_of_one_token_has_nothing_to_score() -> None:
    assert len(KneserNey(np.array([1], np.uint16), 3).nats(np.array([2], np.uint16))) == 0
