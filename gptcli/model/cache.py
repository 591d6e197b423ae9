"""The keys and values a model has seen, as a value that is passed to `GPT.forward`.

The model holds no state of a conversation, so one model can serve many. Letters as in gpt.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from gptcli.model.extras import late_half, offset_keys

# A kernel for one new token of each text, float32: q (B, H, 1, D), k and v (B, G, 1, D), what the
# layer has stored, `position`, `length` and whether keys are offset. It stores and attends.
AttendFn = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None, int, bool], Tensor]


@dataclass
class KVCache:
    """Keys and values of every layer.

    Attributes:
        size: The maximum number of tokens.
        length: Tokens seen, the position of the next one; the largest where texts differ in length.
        layers: For each layer a tensor (B, 2G, size, D), the keys before the values, in the
            precision of the keys; allocated when the layer first stores some. With offset keys
            there is one place more, where half of the next key waits.
        tokens: The tokens themselves, (B, size), for a model that asks for the one before.
        before: The one before the next token, (B, 1), from a caller that knows it.
        position: Where the next single token goes, int64 on the device: (B, 1) for texts that
            differ in length. (1,) for texts of one length; a step of one token then has the same
            shapes at every position, as a CUDA graph needs. None otherwise.
        kernel: What attends for single tokens in float32; None leaves that to torch.
    """

    size: int
    length: int = 0
    layers: list[Tensor] = field(default_factory=list)
    tokens: Tensor | None = None
    before: Tensor | None = None
    position: Tensor | None = None
    kernel: AttendFn | None = None

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, offset: bool = False) -> Tensor:
        """Store keys and values as `extend` does; return what queries (B, H, T, D) find there."""
        is_step = q.shape[2] == 1 and q.dtype == torch.float32 and layer < len(self.layers)
        if self.kernel is not None and is_step and not self.is_fixed:
            return self.kernel(q, k, v, self.layers[layer], self.position, self.length, offset)
        keys, values = self.extend(layer, k, v, offset)
        return cached_attention(q, keys, values, self.visible)

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
            self.layers.append(keys.new_zeros(B, 2 * G, self.size + offset, D))
        stored = self.layers[layer]
        if offset:
            late = late_half(stored.narrow(1, 0, G))  # (B, G, S, 2, D / 4)
            last, before = late_half(keys)[:, :, -1:], self._at(late, 2, 0) if self.length else None
            keys = offset_keys(keys, before)
            self._put(late, 2, T, last)
        self._put(stored, 2, 0, torch.cat((keys, values), dim=1))
        seen = stored.narrow(2, 0, self._n_seen(T))
        return seen.narrow(1, 0, G), seen.narrow(1, G, G)

    def extend_tokens(self, tokens: Tensor) -> Tensor | None:
        """Store new tokens (B, T); return the one before them, (B, 1), or None at the start."""
        if self.before is not None:
            return self.before
        if self.tokens is None:
            self.tokens = tokens.new_zeros(len(tokens), self.size)
        self._put(self.tokens, 1, 0, tokens)
        return self._at(self.tokens, 1, -1) if self.length else None

    @property
    def is_fixed(self) -> bool:
        """Whether a step has the same shapes at every position."""
        return self.position is not None and self.position.ndim == 1

    def _n_seen(self, n_new: int) -> int:
        return self.size if self.is_fixed else self.length + n_new

    def _put(self, stored: Tensor, dim: int, shift: int, new: Tensor) -> None:
        """Write at the next place, or so many after it."""
        if self.position is None:
            stored.narrow(dim, self.length + shift, new.shape[dim]).copy_(new)
        elif self.position.ndim == 1:
            stored.index_copy_(dim, self.position + shift, new)
        else:
            rows = torch.arange(len(new), device=new.device)
            stored.movedim(dim, 1)[rows, self.position[:, 0] + shift] = new.select(dim, 0)

    def _at(self, stored: Tensor, dim: int, shift: int) -> Tensor:
        """Return what is at the next place, or so many after it."""
        if self.position is None:
            return stored.narrow(dim, self.length + shift, 1)
        if self.position.ndim == 1:
            return stored.index_select(dim, self.position + shift)
        rows = torch.arange(len(stored), device=stored.device)
        return stored.movedim(dim, 1)[rows, self.position[:, 0] + shift].unsqueeze(dim)

    @property
    def visible(self) -> Tensor | None:
        """Which keys the token at `position` sees, (1 or B, 1, 1, S) bool; None without it."""
        if self.position is None:
            return None
        places = torch.arange(self._n_seen(1), device=self.position.device)
        return (places <= self.position.view(-1, 1))[:, None, None]

    def of_rows(self, rows: Sequence[int]) -> "KVCache":
        """Return what some of the texts have seen; a text may be named more than once."""
        index = torch.tensor(rows, device=self.layers[0].device)
        layers = [layer.index_select(0, index) for layer in self.layers]
        tokens = None if self.tokens is None else self.tokens.index_select(0, index)
        return KVCache(self.size, self.length, layers, tokens, kernel=self.kernel)


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
