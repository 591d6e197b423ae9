"""Windows of a split, counted: to train on and to score."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcli.config.windows import epochs, eval_tokens, scoring_windows, training_windows


def test_epochs_are_passes_over_the_windows_whatever_the_stride() -> None:
    n_windows = training_windows(10_000, 16, 8)
    assert n_windows == 1_248 and training_windows(17, 16, 16) == 1
    assert epochs(3 * n_windows // 4, 4, n_windows) == 3.0  # not 5.99, which tokens would give


@given(st.integers(2, 500), st.integers(1, 40), st.integers(1, 600))
def test_the_tokens_said_are_the_tokens_scored(n_tokens: int, seq_len: int, most: int) -> None:
    from gptcli.evaluation import windows

    chosen, total = scoring_windows(n_tokens, seq_len, seq_len, most)
    window = windows(n_tokens, seq_len, seq_len)
    scored = sum(window(i * total // chosen).n_scored for i in range(chosen))
    assert eval_tokens([(n_tokens, n_tokens)], seq_len, most)[1] == scored


@pytest.mark.parametrize(("most", "scored"), [(None, (999, 0)), (100, (96, 0))])
def test_without_validation_only_training_tokens_are_scored(
    most: int | None, scored: tuple[int, int]
) -> None:
    assert eval_tokens([(1_000, 0)], 16, most) == scored
