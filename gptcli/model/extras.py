"""What GPT-2 has not: rotary positions, cheap capacity beside the blocks, several texts in a row.

Embeddings of pairs and keys of the token before are off unless the configuration names them; both
come from the speed runs of KellerJordan/modded-nanogpt. Letters as in gpt.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from gptcli.config.model import ModelConfig

_HASH = 36313, 27191  # odd, so that neighboring ids land far apart


def rope_cache(positions: Tensor, config: ModelConfig) -> Tensor:
    """Return cosines and sines (Su et al. 2021) of positions (T,) or (B, T): (2, [B, 1,] T, D)."""
    D = config.head_size
    exponents = torch.arange(0, D, 2, device=positions.device, dtype=torch.float32) / D
    angles = positions.float()[..., None] * config.rope_theta**-exponents
    angles = torch.cat((angles, angles), dim=-1)
    if positions.ndim == 2:
        angles = angles[:, None]
    return torch.stack((angles.cos(), angles.sin()))


def apply_rope(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn queries or keys (B, H, T, D) by their positions, halves as pairs (as Llama does)."""
    cos, sin = rotation.to(x.dtype).unbind(0)  # (T, D) each
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Packed(NamedTuple):
    """Several texts in each row, none of which sees another.

    Attributes:
        begins: Which tokens are the first of a text, (B, T) bool.
        mask: What attention adds to its scores, (B, 1, T, T): 0, or -inf for what is not seen.
    """

    begins: Tensor
    mask: Tensor


def pack(starts: Tensor, dtype: torch.dtype) -> Packed:
    """Return what keeps the texts of rows apart.

    Args:
        starts: Where in its row the text of each token begins, (B, T) int64.
        dtype: Of the scores.
    """
    T = starts.shape[1]
    places = torch.arange(T, device=starts.device)
    is_seen = (places <= places[:, None]) & (places >= starts[:, :, None])  # (B, T, T)
    mask = torch.zeros(is_seen.shape, dtype=dtype, device=starts.device)
    return Packed(places == starts, mask.masked_fill_(~is_seen, -torch.inf)[:, None])


def bigram_rows(
    tokens: Tensor, before: Tensor | None, n_rows: int, packed: Packed | None = None
) -> Tensor:
    """Return the row (B, T) of each token and the one before it in a table of hashed pairs.

    Args:
        tokens: (B, T).
        before: The token before the first, (B, 1); None where the text begins.
        n_rows: Rows of the table; pairs that share one are told apart by the blocks.
        packed: The texts of a row, if there are several.
    """
    if before is None:
        before = torch.full_like(tokens[:, :1], -1)
    previous = torch.cat((before, tokens[:, :-1]), dim=1)
    if packed is not None:
        previous = previous.masked_fill(packed.begins, -1)
    return (previous * _HASH[0] ^ tokens * _HASH[1]) % n_rows


def late_half(keys: Tensor) -> Tensor:
    """Return a view of the slowest half of the rotary channels, (..., D) to (..., 2, D / 4)."""
    return keys.view(*keys.shape[:-1], 2, 2, -1)[..., 1, :]


def offset_keys(keys: Tensor, before: Tensor | None, packed: Packed | None = None) -> Tensor:
    """Move the late half of the keys (B, G, T, D) one token on.

    A query then finds the token after the one that it looks for, which takes two layers otherwise:
    what repeats is copied sooner.

    Args:
        keys: Rotated.
        before: The late half for the first, (B, G, 1, 2, D / 4); None where the text begins.
        packed: The texts of a row, if there are several.
    """
    early, late = keys.reshape(*keys.shape[:-1], 2, 2, -1).unbind(-2)
    if before is None:
        before = torch.zeros_like(late[:, :, :1])
    late = torch.cat((before, late[:, :, :-1]), dim=2)
    if packed is not None:
        late = late.masked_fill(packed.begins[:, None, :, None, None], 0)
    return torch.stack((early, late), dim=-2).flatten(-3)
