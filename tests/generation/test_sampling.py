"""What may be drawn, and draws that follow it."""

import contextlib
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from gptcli.config import GenerateConfig
from gptcli.generation.sampling import apply_repetition_penalty, filter_logits, sample_tokens

LOGITS = torch.tensor([[2.0, 0.5, 3.0, -1.0, 1.0]])


def kept(config: GenerateConfig, logits: torch.Tensor = LOGITS) -> dict[int, float]:
    """Return the tokens of the first row that may be drawn, with their probabilities."""
    ids, weights = filter_logits(logits, config)
    probs = weights / weights.sum(-1, keepdim=True)
    row = torch.arange(logits.shape[1]) if ids is None else ids[0]
    found = zip(row.tolist(), probs[0].tolist(), strict=True)
    return {token: p for token, p in found if p > 0}


def test_top_k_keeps_the_likeliest() -> None:
    found = kept(GenerateConfig(top_k=2))
    assert set(found) == {2, 0}
    assert sum(found.values()) == pytest.approx(1)


def test_without_a_limit_all_may_be_drawn_with_the_softmax_s_probabilities() -> None:
    found = kept(GenerateConfig(temperature=0.5))
    expected = torch.softmax(LOGITS[0] / 0.5, 0).tolist()
    assert list(found.values()) == pytest.approx(expected)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    just_two = float(torch.softmax(LOGITS[0], 0).sort(descending=True).values[:2].sum())
    assert set(kept(GenerateConfig(temperature=1, top_p=just_two - 1e-4))) == {2, 0}
    assert set(kept(GenerateConfig(temperature=1, top_p=just_two + 1e-4))) == {2, 0, 4}


@pytest.mark.parametrize("spread", [0.001, 3.0])
def test_top_p_of_a_large_vocabulary_keeps_what_a_sort_would(spread: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(1, 3000) * spread
    values, order = torch.softmax(logits[0], 0).sort(descending=True)
    n = int((values.cumsum(0) - values < 0.7).sum())
    found = kept(GenerateConfig(temperature=1, top_p=0.7), logits)
    assert set(found) == set(order[:n].tolist())


def test_min_p_is_relative_to_the_likeliest() -> None:
    assert set(kept(GenerateConfig(temperature=1, min_p=0.3))) == {2, 0}  # e^-1 stays, e^-2 goes
    assert set(kept(GenerateConfig(temperature=1, min_p=0.3, top_p=0.5))) == {2}


def test_temperature_sharpens_and_flattens() -> None:
    assert kept(GenerateConfig(temperature=0.1))[2] > 0.99
    assert kept(GenerateConfig(temperature=10))[2] < 0.3


@pytest.mark.parametrize("temperature", [1e-308, 1e-40, 1e-6])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    for config in (GenerateConfig(temperature=temperature, top_k=k) for k in (None, 3)):
        assert sample_tokens(LOGITS * 100, config, [0.7]) == [2]


def test_temperature_zero_takes_the_likeliest() -> None:
    assert sample_tokens(LOGITS, GenerateConfig(temperature=0), [0.999]) == [2]


@pytest.mark.parametrize("top_k", [None, 4])
def test_draws_follow_the_distribution(top_k: int | None) -> None:
    config, n = GenerateConfig(temperature=1, top_k=top_k), 4000
    drawn = sample_tokens(LOGITS.expand(n, -1), config, [(i + 0.5) / n for i in range(n)])
    counts = torch.bincount(torch.tensor(drawn), minlength=5) / n
    found = kept(config)
    expected = torch.tensor([found.get(token, 0.0) for token in range(5)])
    assert torch.allclose(counts, expected, atol=1e-3)


@given(st.floats(0, 1, exclude_max=True))
def test_every_uniform_number_draws_a_candidate(uniform: float) -> None:
    for config in (
        GenerateConfig(temperature=1, top_k=3, top_p=0.9),
        GenerateConfig(temperature=1, min_p=0.2),
    ):
        assert sample_tokens(LOGITS, config, [uniform])[0] in kept(config)


def test_rows_are_drawn_as_if_alone() -> None:
    torch.manual_seed(1)
    logits, uniforms = torch.randn(6, 900), torch.rand(6).tolist()
    for config in (GenerateConfig(top_p=0.9), GenerateConfig(), GenerateConfig(top_k=20)):
        together = sample_tokens(logits, config, uniforms)
        alone = [sample_tokens(logits[i : i + 1], config, uniforms[i : i + 1])[0] for i in range(6)]
        assert together == alone


def test_equally_likely_tokens_are_drawn_as_if_alone_beside_a_row_that_is_sorted() -> None:
    sharp = torch.full((1, 4000), -20.0)
    sharp[0, ::100] = 5.0  # 40 tokens of the same probability
    flat = torch.zeros(1, 4000)
    config = GenerateConfig(top_p=0.9)
    for uniform in (0.1, 0.37, 0.5, 0.81):
        [alone] = sample_tokens(sharp, config, [uniform])
        beside, _ = sample_tokens(torch.cat((sharp, flat)), config, [uniform, 0.5])
        assert beside == alone


def test_a_penalty_makes_seen_tokens_less_likely_on_both_sides_of_zero() -> None:
    seen = torch.tensor([[True, False, False, True, False]])
    found = apply_repetition_penalty(LOGITS, seen, 2.0)
    assert found.tolist() == [[1.0, 0.5, 3.0, -2.0, 1.0]]


def test_a_deterministic_draw_sums_nothing_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's cumulative sum is refused then; `meta`, which has no values, stands in for CUDA."""
    called = []

    class Recording(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    for is_deterministic in (False, True):
        called.clear()
        monkeypatch.setattr(
            torch, "are_deterministic_algorithms_enabled", lambda on=is_deterministic: on
        )
        with Recording(), contextlib.suppress(NotImplementedError, RuntimeError):
            sample_tokens(torch.zeros(1, 5, device="meta"), GenerateConfig(), [0.5])
        assert any("cumsum" in name for name in called) != is_deterministic
