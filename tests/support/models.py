"""Tiny models in which nothing is zero, and tokens for them."""

import torch
from torch import Tensor

from gptcli.config import ModelConfig
from gptcli.model import GPT

N_TOKENS = 61


def tiny_model(**shape: object) -> GPT:
    """Return a model away from its initialization, where some of it is zero."""
    model = GPT(ModelConfig(n_head=4, n_embd=32, vocab_size=N_TOKENS, **shape))
    model.init_weights(1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.empty(parameter.shape).normal_(0, 0.3, generator=generator))
    return model.eval()


def tokens_of(rows: int, length: int) -> torch.Tensor:
    """Return tokens (rows, length) for it."""
    return torch.randint(N_TOKENS, (rows, length), generator=torch.Generator().manual_seed(3))


def distance(a: Tensor, b: Tensor) -> float:
    """Return how far a is from b, in parts of b."""
    return float((a - b).norm() / b.norm())
