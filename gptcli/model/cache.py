"""The keys and values a model has seen, as a value that is passed to `GPT.forward`.

The model holds no state of a conversation, so one model can serve many. Letters as in gpt.py.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from gptcli.model.extras import late_half, offset_keys


@dataclass
class KVCache:
    """Keys and values of every layer.

    Attributes:
        size: The maximum number of tokens.
        length: Tokens seen, the position of the next one; the largest where texts differ in length.
        layers: For each layer a tensor (B, 2G, size, D), the keys before the values; allocated
            when the layer first stores some. With offset keys there is one place more, where half
            of the next key waits.
        before: The last token seen of each text, (B, 1).
        position: Where the next single token goes, int64 on the device: (B, 1) for texts that
            differ in length. (1,) for texts of one length; a step of one token then has the same
            shapes at every position, as a CUDA graph needs. None otherwise.
        dtype: The precision in which keys and values are stored; None is that in which they come.
    """

    size: int
    length: int = 0
    layers: list[Tensor] = field(default_factory=list)
    before: Tensor | None = None
    position: Tensor | None = None
    dtype: torch.dtype | None = None

    def extend(
        self, layer: int, keys: Tensor, values: Tensor, offset: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Store the keys and values (B, G, T, D) of new tokens; return those of all, (B, G, S, D).

        With `position`, `visible` says which of the S are to be attended to. With `offset`, half
        of each key goes to the next place (see `offset_keys`).

        `length` stays: every layer stores at the same place, then the model advances it once.
        """
        B, G, T, D = keys.shape
        if layer == len(self.layers):
            shape = B, 2 * G, self.size + offset, D
            self.layers.append(keys.new_zeros(shape, dtype=self.dtype))
        stored = self.layers[layer]
        if offset:
            late = late_half(stored.narrow(1, 0, G))  # (B, G, S, 2, D / 4)
            last, before = late_half(keys)[:, :, -1:], self._next(late) if self.length else None
            keys = offset_keys(keys, None if before is None else before.to(keys.dtype))
            self._put(late, T, last)
        self._put(stored, 0, torch.cat((keys, values), dim=1))
        seen = stored.narrow(2, 0, self._n_seen(T)).to(keys.dtype)
        return seen.narrow(1, 0, G), seen.narrow(1, G, G)

    def _n_seen(self, n_new: int) -> int:
        is_fixed = self.position is not None and self.position.ndim == 1
        return self.size if is_fixed else self.length + n_new

    def _put(self, stored: Tensor, shift: int, new: Tensor) -> None:
        """Write at the next place of (B, ., size, ...), or so many after it."""
        if self.position is None:
            stored.narrow(2, self.length + shift, new.shape[2]).copy_(new)
        else:
            stored.movedim(2, 1)[self._places(stored, shift)] = new.select(2, 0).to(stored.dtype)

    def _next(self, stored: Tensor) -> Tensor:
        """Return what is at the next place."""
        if self.position is None:
            return stored.narrow(2, self.length, 1)
        return stored.movedim(2, 1)[self._places(stored)].unsqueeze(2)

    def _places(self, stored: Tensor, shift: int = 0) -> tuple[Tensor, Tensor]:
        """Return each text, and the place in it that is next, or so many after it; (B,) each."""
        assert self.position is not None
        rows = torch.arange(len(stored), device=stored.device)
        return rows, (self.position.flatten() + shift).expand(len(rows))

    @property
    def visible(self) -> Tensor | None:
        """Which keys the token at `position` sees, (1 or B, 1, 1, S) bool; None without it."""
        if self.position is None:
            return None
        places = torch.arange(self._n_seen(1), device=self.position.device)
        return (places <= self.position.view(-1, 1))[:, None, None]


def cached_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attend from the last T of S tokens: queries (B, H, T, D) to the cache's (B, G, S, D).

    A mask (1 or B, 1, 1, S) says which of the S a single token sees; without one it sees all.
    """
    n_new, n_seen = q.shape[2], k.shape[2]
    if n_new not in (1, n_seen):  # for T = S the kernel has its own mask
        mask = torch.ones(n_new, n_seen, dtype=torch.bool, device=q.device).tril(n_seen - n_new)
    y: Tensor = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=n_new == n_seen > 1, enable_gqa=k.shape[1] != q.shape[1]
    )
    return y
