"""The keys and values a network has seen, as a value that is handed to `GPT.forward`.

The network holds no state of a conversation, so one network can serve many.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class KVCache:
    """Keys and values of every layer, (L, B, G, S, D) with room for S tokens.

    Attributes:
        length: Tokens seen, the position of the next one.
    """

    keys: Tensor
    values: Tensor
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
        shape = (n_layer, batch, n_kv_head, size, head_size)
        return cls(
            torch.zeros(shape, dtype=dtype, device=device),
            torch.zeros(shape, dtype=dtype, device=device),
        )

    @property
    def size(self) -> int:
        """Tokens there is room for."""
        return self.keys.shape[3]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store the keys and values (B, G, T, D) of new tokens; return those of all, (B, G, S, D).

        `length` stays: every layer stores at the same place, then the network advances it once.
        """
        start, end = self.length, self.length + keys.shape[2]
        self.keys[layer, :, :, start:end] = keys
        self.values[layer, :, :, start:end] = values
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]
