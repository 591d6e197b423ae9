"""Cheap capacity beside the blocks: embeddings of pairs, keys of the token before, capped logits.

Each is off unless the configuration names it; `gpt.py` reads the same without them. All come from
the speed runs of KellerJordan/modded-nanogpt. Letters as in gpt.py.
"""

import torch
from torch import Tensor

_HASH = 36313, 27191  # odd, so that neighboring ids land far apart


def bigram_rows(tokens: Tensor, before: Tensor | None, n_rows: int) -> Tensor:
    """Return the row (B, T) of each token and the one before it in a table of hashed pairs.

    Args:
        tokens: (B, T).
        before: The token before the first, (B, 1); None where the text begins.
        n_rows: Rows of the table; pairs that share one are told apart by the blocks.
    """
    if before is None:
        before = torch.full_like(tokens[:, :1], -1)
    previous = torch.cat((before, tokens[:, :-1]), dim=1)
    return (previous * _HASH[0] ^ tokens * _HASH[1]) % n_rows


def late_half(keys: Tensor) -> Tensor:
    """Return a view of the slowest half of the rotary channels, (..., D) to (..., 2, D / 4)."""
    return keys.view(*keys.shape[:-1], 2, 2, -1)[..., 1, :]


def offset_keys(keys: Tensor, before: Tensor | None) -> Tensor:
    """Move the late half of the keys (B, G, T, D) one token on.

    A query then finds the token after the one that it looks for, which takes two layers otherwise:
    what repeats is copied sooner.

    Args:
        keys: Rotated.
        before: The late half for the first, (B, G, 1, 2, D / 4); None where the text begins.
    """
    early, late = keys.reshape(*keys.shape[:-1], 2, 2, -1).unbind(-2)
    if before is None:
        before = torch.zeros_like(late[:, :, :1])
    late = torch.cat((before, late[:, :, :-1]), dim=2)
    return torch.stack((early, late), dim=-2).flatten(-3)
