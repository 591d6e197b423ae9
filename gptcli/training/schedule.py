"""The learning rate as a pure function of the step."""

import math
from typing import assert_never

from gptcli.config.schema import Config

WSD_DECAY_FRACTION = 0.2


def lr_at(step: int, max_steps: int, config: Config) -> float:
    """Return the learning rate of the step that follows `step` finished ones.

    A linear warm-up, then the configured course, which reaches min_lr at the last step. "wsd"
    (Hu et al. 2024) holds the peak and falls linearly over the last fifth.
    """
    optim, lr, min_lr = config.optim, config.optim.lr, config.min_lr
    if step < optim.warmup_steps:
        return lr * (step + 1) / optim.warmup_steps
    first, last = optim.warmup_steps, max(max_steps - 1, optim.warmup_steps + 1)
    done = min(1.0, (step - first) / (last - first))
    match optim.schedule:
        case "cosine":
            left = 0.5 * (1.0 + math.cos(math.pi * done))
        case "linear":
            left = 1.0 - done
        case "wsd":
            left = min(1.0, (1.0 - done) / WSD_DECAY_FRACTION)
        case "constant":
            return lr
        case unreachable:
            assert_never(unreachable)
    return min_lr + left * (lr - min_lr)
