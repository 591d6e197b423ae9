"""Conversations in memory, and folders of them, without any text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass
class Chats:
    """Conversations by number: (tokens, trained) of each."""

    chats: Sequence[tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """The tokens of each."""
        return np.array([len(tokens) for tokens, _ in self.chats], dtype=np.int64)

    def read(self, number: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """Return the tokens of one and which of them are trained on."""
        return self.chats[number]


def chats_of(*lengths: int, vocab_size: int = 200) -> Chats:
    """Return conversations of so many tokens, the second half of each trained on but its last."""
    chats = []
    for number, length in enumerate(lengths):
        tokens = np.random.default_rng(number).integers(1, vocab_size, length).astype(np.uint16)
        places = np.arange(length)
        chats.append((tokens, (places >= length // 2) & (places < length - 1)))
    return Chats(chats)
