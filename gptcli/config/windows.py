"""How many windows a split has, to train on and to score: plain arithmetic, for all who say so."""

import math

MOST_EVAL_TOKENS = 1_000_000


def training_windows(n_tokens: int, seq_len: int, stride: int) -> int:
    """Return the windows of one epoch; the last stride - 1 tokens are left to its offset."""
    return max(1, (n_tokens - 1 - seq_len - (stride - 1)) // stride + 1)


def epochs(steps: int, windows_per_step: int, n_windows: int) -> float:
    """Return the passes over the training windows that so many steps make."""
    return steps * windows_per_step / n_windows


def scoring_windows(
    n_tokens: int, context: int, stride: int, most: int | None = None
) -> tuple[int, int]:
    """Return how many windows score about `most` tokens, and how many score all of them."""
    total = 1 + max(0, math.ceil((n_tokens - 1 - context) / stride))
    return min(total, max(1, most // stride)) if most else total, total


def eval_tokens(n_train: int, n_val: int, seq_len: int, most: int | None) -> tuple[int, int]:
    """Return the training and validation tokens that an evaluation during a run scores.

    Args:
        n_train: Tokens of the training split.
        n_val: Tokens of the validation split; 0 without one.
        seq_len: Tokens of a window.
        most: `train.eval_tokens`.
    """
    most = most or MOST_EVAL_TOKENS
    n_scored_val = _scored(n_val, seq_len, most) if n_val else 0
    return _scored(n_train, seq_len, min(most, n_val or most)), n_scored_val


def _scored(n_tokens: int, seq_len: int, most: int) -> int:
    chosen, total = scoring_windows(n_tokens, seq_len, seq_len, most)
    return n_tokens - 1 if chosen == total else chosen * seq_len
