"""The keys and values a model has seen, as a value that is passed to `GPT.forward`.

The model holds no state of a conversation, so one model can serve many. Letters as in gpt.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class KVCache:
    """Keys and values of every layer.

    Attributes:
        size: The maximum number of tokens.
        length: Tokens seen, the position of the next one.
        layers: For each layer a tensor (B, 2G, size, D), the keys before the values, in the
            precision of the keys; allocated when the layer first stores some.
        position: Where the next single token goes, (1,) int64 on the device. With it, a step of one
            token has the same shapes at every position, as a CUDA graph needs. None otherwise.
    """

    size: int
    length: int = 0
    layers: list[Tensor] = field(default_factory=list)
    position: Tensor | None = None

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values (B, G, T, D) of new tokens; return those of all, (B, G, S, D).

        With `position`, S is `size`, and `visible` says which of them are to be attended to.

        `length` stays: every layer stores at the same place, then the model advances it once.
        """
        B, G, T, D = keys.shape
        if layer == len(self.layers):
            self.layers.append(keys.new_zeros(B, 2 * G, self.size, D))
        stored = self.layers[layer]
        if self.position is not None:
            stored.index_copy_(2, self.position, torch.cat((keys, values), dim=1))
            return stored.narrow(1, 0, G), stored.narrow(1, G, G)
        stored.narrow(2, self.length, T).copy_(torch.cat((keys, values), dim=1))
        seen = stored.narrow(2, 0, self.length + T)
        return seen.narrow(1, 0, G), seen.narrow(1, G, G)

    @property
    def visible(self) -> Tensor | None:
        """Which of the keys the token at `position` sees, (1, S) bool; None without it."""
        if self.position is None:
            return None
        return (torch.arange(self.size, device=self.position.device) <= self.position)[None]

    def of_rows(self, rows: Sequence[int]) -> "KVCache":
        """Return what some of the texts have seen; a text may be named more than once."""
        index = torch.tensor(rows, device=self.layers[0].device)
        layers = [layer.index_select(0, index) for layer in self.layers]
        return KVCache(self.size, self.length, layers)
