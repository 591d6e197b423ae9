"""From logits to tokens: repetition penalty, temperature, top-k, then top-p and min-p.

Letters as in gpt.py; K candidates.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gptcli.config.schema import GenerateConfig

# Top-p looks at this many likeliest tokens first: for a sharp distribution they suffice, and no
# sort of the whole vocabulary is needed.
_LIKELIEST = 512
_LEAST_TEMPERATURE = torch.finfo(torch.float32).tiny


def filter_logits(logits: Tensor, config: GenerateConfig) -> tuple[Tensor | None, Tensor]:
    """Return the tokens that may be drawn, (B, K), and weights in proportion to their chances.

    Top-p is Holtzman et al. 2020, min-p Nguyen et al. 2024; both judge what top-k leaves. What may
    not be drawn has weight 0. Tokens are None if they are all of the vocabulary, in order.

    Logits are (B, V), float32; the temperature is above 0.
    """
    V = logits.shape[-1]
    # As few operations as will do: between two steps, with cold caches, each takes 10 us and more.
    if config.top_k is not None and config.top_k < V:
        logits, ids = torch.topk(logits, config.top_k)
        largest = logits[:, :1]
    else:
        ids, largest = None, logits.amax(-1, keepdim=True)
    # The largest is subtracted first, or a low temperature overflows.
    temperature = max(config.temperature, _LEAST_TEMPERATURE)  # a lower one is 0 in float32
    probs = torch.softmax((logits - largest) / temperature, dim=-1)
    least = None if config.min_p is None else config.min_p * probs.amax(-1, keepdim=True)
    if config.top_p is not None:
        if ids is None:
            values, ids = torch.topk(probs, n := min(_LIKELIEST, V))
            is_flat = values.sum(-1, dtype=_sums_dtype(values)) < config.top_p
            if bool(is_flat.any()):  # only these are sorted: ties are in the order they have alone
                values, ids = F.pad(values, (0, V - n)), F.pad(ids, (0, V - n))
                sort = torch.sort(probs[is_flat], dim=-1, descending=True, stable=True)
                values[is_flat], ids[is_flat] = sort
            probs = values
        probs = probs * (probs.cumsum(-1) - probs < config.top_p)
    if least is not None:
        probs = probs * (probs >= least)
    return ids, probs


def sample_tokens(logits: Tensor, config: GenerateConfig, uniforms: Sequence[float]) -> list[int]:
    """Return one token for each row of logits (B, V): its distribution's inverse at a number.

    The numbers are in [0, 1), one a row, so that a row's draw depends on nothing else.
    """
    if config.temperature == 0:
        greedy: list[int] = logits.argmax(-1).tolist()
        return greedy
    if torch.are_deterministic_algorithms_enabled():
        logits = logits.cpu()  # where sums have one order: CUDA's cumsum is refused then
    ids, weights = filter_logits(logits, config)
    ends = weights.cumsum(-1, dtype=_sums_dtype(weights))  # (B, K)
    # A sum times what is below 1 by half of eps or more is below the sum, so that no number leads
    # beyond the last candidate, to one of weight 0.
    most = 1 - torch.finfo(ends.dtype).eps / 2
    places = [[min(uniform, most)] for uniform in uniforms]
    points = torch.tensor(places, dtype=ends.dtype, device=ends.device) * ends[:, -1:]
    at = torch.searchsorted(ends, points, right=True)  # (B, 1)
    tokens: list[int] = (at if ids is None else ids.gather(-1, at))[:, 0].tolist()
    return tokens


def _sums_dtype(probs: Tensor) -> torch.dtype:
    return torch.float32 if probs.device.type == "mps" else torch.float64  # which MPS lacks


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens `seen` (B, V) in their text less likely (Keskar et al. 2019, CTRL).

    The penalty divides logits (B, V) above zero and multiplies those below.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
