"""Conversations in memory, and folders of them, without any text."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptcli import cli

from .texts import sentences


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


# A tiny run on conversations; rows hold a few each.
CHATTY = ("model.block_size=128", "train.micro_batch_size=4", "train.eval_tokens=512")


def prepare_chats(n: int = 90) -> None:
    """Prepare conversations of one to three questions as bytes, in data/tiny."""
    lines = []
    for number in range(n):
        said = []
        for turn in range(1 + number % 3):
            said.append(
                {"role": "user", "content": "what is " + "abcdefgh"[turn : turn + number % 5 + 1]}
            )
            said.append(
                {"role": "assistant", "content": sentences(1 + number % 2)[: 10 + number % 40]}
            )
        lines.append(json.dumps({"messages": said}))
    Path("chats.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = ["prepare", "chats.jsonl", "--out", "data/tiny", "-s", "tokenizer.name=bytes"]
    assert cli.run([*words, "-s", "data.val_fraction=0.2"]) == 0
