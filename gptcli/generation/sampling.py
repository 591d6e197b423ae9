"""From logits to tokens: what may be drawn, and draws that are functions of their keys.

Order: repetition penalty, temperature, top-k, then top-p and min-p. Knows nothing of networks.
Letters as in gpt.py; K candidates.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gptcli.config.schema import GenerateConfig

# Top-p looks at this many likeliest tokens first: all of a sharp distribution, without a sort.
_LIKELIEST = 512


def filter_logits(logits: Tensor, config: GenerateConfig) -> tuple[Tensor | None, Tensor]:
    """Return the tokens that may be drawn, (B, K), and their probabilities, (B, K).

    Top-p is Holtzman et al. 2020, min-p Nguyen et al. 2024; both judge what top-k leaves. What may
    not be drawn has probability 0. Tokens are None if they are all of the vocabulary, in order.

    Args:
        logits: (B, V), float32.
        config: How to sample; temperature above 0.
    """
    V = logits.shape[-1]
    ids = None
    if config.top_k is not None and config.top_k < V:
        logits, ids = torch.topk(logits, config.top_k)
    likeliest = logits.amax(-1, keepdim=True)  # less it, no temperature overflows
    probs = torch.softmax((logits - likeliest) / config.temperature, dim=-1)
    least = None if config.min_p is None else config.min_p * probs.amax(-1, keepdim=True)
    if config.top_p is not None:
        if ids is None:
            probs, ids = _likeliest(probs, config.top_p)
        probs = probs * (probs.cumsum(-1) - probs < config.top_p)
    if least is not None:
        probs = probs * (probs >= least)
    return ids, probs / probs.sum(-1, keepdim=True)


def _likeliest(probs: Tensor, reached: float) -> tuple[Tensor, Tensor]:
    """Return the likeliest tokens that together reach a probability, sorted: (B, K) each."""
    values, ids = torch.topk(probs, min(_LIKELIEST, probs.shape[-1]))
    if bool((values.double().sum(-1) < reached).any()):
        values, ids = torch.sort(probs, dim=-1, descending=True, stable=True)
    return values, ids


def sample_tokens(logits: Tensor, config: GenerateConfig, uniforms: Sequence[float]) -> list[int]:
    """Return one token for each row of logits (B, V).

    A row's distribution is inverted at its number in [0, 1), so that the draw depends on nothing
    else.
    """
    if config.temperature == 0:
        likeliest: list[int] = logits.argmax(-1).tolist()
        return likeliest
    ids, probs = filter_logits(logits, config)
    ends = probs.cumsum(-1, dtype=torch.float64)  # (B, K)
    wanted = torch.tensor(uniforms, dtype=torch.float64)[:, None] * ends[:, -1:]
    at = torch.searchsorted(ends, wanted, right=True).clamp(max=ends.shape[-1] - 1)  # (B, 1)
    # Rounding may lead behind the last candidate, to one of probability 0.
    last = (ends < ends[:, -1:]).sum(-1, keepdim=True)
    at = torch.minimum(at, last)
    tokens: list[int] = (at if ids is None else ids.gather(-1, at))[:, 0].tolist()
    return tokens


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that were there already less likely (Keskar et al. 2019, CTRL).

    Args:
        logits: (B, V).
        seen: Which tokens each text holds, (B, V), bool.
        penalty: Divides logits above zero and multiplies those below; 1 changes nothing.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
