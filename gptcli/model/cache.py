"""The keys and values a network has seen, as a value that is handed to `GPT.forward`.

The network holds no state of a conversation, so one network can serve many. Letters as in gpt.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class KVCache:
    """Keys and values of every layer, with room for S tokens.

    Attributes:
        layers: Of each layer a tensor (B, 2G, S, D), the keys before the values.
        length: Tokens seen, the position of the next one.
    """

    layers: list[Tensor]
    length: int = 0

    @classmethod
    def empty(
        cls,
        *,
        n_layer: int,
        batch: int,
        n_kv_head: int,
        size: int,
        head_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> "KVCache":
        """Make room for `size` tokens."""
        shape = (n_layer, batch, 2 * n_kv_head, size, head_size)
        return cls(list(torch.zeros(shape, dtype=dtype, device=device)))

    @property
    def size(self) -> int:
        """Tokens there is room for."""
        return self.layers[0].shape[2]

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the keys and values."""
        return self.layers[0].dtype

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values (B, G, T, D) of new tokens; return those of all, (B, G, S, D).

        `length` stays: every layer stores at the same place, then the network advances it once.
        """
        n_heads, n_new = keys.shape[1:3]
        stored = self.layers[layer]
        new = torch.cat((keys, values), dim=1)
        stored.narrow(2, self.length, n_new).copy_(new)
        seen = stored.narrow(2, 0, self.length + n_new)
        return seen.narrow(1, 0, n_heads), seen.narrow(1, n_heads, n_heads)

    def repeated(self, n: int) -> "KVCache":
        """Return what `n` texts that begin alike have seen; `self` holds one text."""
        return KVCache([layer.repeat(n, 1, 1, 1) for layer in self.layers], self.length)

    def of_rows(self, rows: Sequence[int]) -> "KVCache":
        """Return what some of the texts have seen."""
        index = torch.tensor(rows, device=self.layers[0].device)
        return KVCache([layer.index_select(0, index) for layer in self.layers], self.length)
