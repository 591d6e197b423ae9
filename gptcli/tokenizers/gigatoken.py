"""gigatoken (extra `fast`) in tiktoken's place: the same ids some ten times as fast.

It knows another version of Unicode than tiktoken. Which characters the two see differently is
found out, and text with one of them is left to tiktoken.
"""

import importlib.util
import itertools
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tiktoken

from gptcli.tokenizers.base import Ids, Tokenizer
from gptcli.tokenizers.bpe import GPT2_FILE, GPT2_PATTERN, BpeTokenizer, Ranks, dump_ranks, gpt2

_BETWEEN = "\uffff\ufdd0"  # two code points that are no characters
_UNSEEN, _SAME, _DOUBTFUL = range(3)


class FastBpe:
    """Encodes many texts at once with the ids of a byte-pair vocabulary that splits as GPT-2's."""

    def __init__(self, tokenizer: BpeTokenizer) -> None:
        self._tokenizer = tokenizer
        self._between = tokenizer.vocab_size
        ranks = GPT2_FILE if tokenizer.ranks is gpt2().ranks else tokenizer.ranks
        self._backend = _backend(ranks, {_BETWEEN: self._between})

    def encode(self, texts: list[str]) -> list[Ids]:
        """Return the ids (n,) of each text, as `Tokenizer.encode` does."""
        trusted = [text.isascii() or _kinds().agree_on(text) for text in texts]
        encoded = iter(self._encode(list(itertools.compress(texts, trusted))))
        return [
            next(encoded) if is_trusted else self._tokenizer.encode(text)
            for text, is_trusted in zip(texts, trusted, strict=True)
        ]

    def _encode(self, texts: list[str]) -> list[Ids]:
        # All in one call, as one text with special tokens between: gigatoken's batches would cost
        # more, and a library more.
        ids: Ids = self._backend.encode(_BETWEEN.join(texts))
        ends = [*np.flatnonzero(ids == self._between), len(ids)] if texts else []
        starts = [0, *(end + 1 for end in ends[:-1])]
        return [ids[start:end] for start, end in zip(starts, ends, strict=False)]


def fast_bpe(tokenizer: Tokenizer) -> FastBpe | None:
    """Return a faster encoder for a vocabulary that splits as GPT-2's, None without gigatoken.

    GPTCLI_FAST=0 in the environment switches it off.
    """
    if not isinstance(tokenizer, BpeTokenizer) or tokenizer.pattern != GPT2_PATTERN:
        return None
    if os.environ.get("GPTCLI_FAST") == "0" or importlib.util.find_spec("gigatoken") is None:
        return None
    return _made(tokenizer)


_made = cache(FastBpe)


class Kinds:
    """Knows which characters gigatoken and tiktoken take for the same kind.

    Seen through a vocabulary of single bytes and of each byte after an `x`, a `1` and a `.`: a
    character joins the one before it exactly if both are letters, numbers or neither.
    """

    def __init__(self) -> None:
        ranks = {bytes([byte]): byte for byte in range(256)}
        for first in b"x1.":
            for byte in range(128, 256):
                ranks[bytes([first, byte])] = len(ranks)
        self._tiktoken = tiktoken.Encoding(
            "kinds", pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={}
        )
        self._gigatoken = _backend(ranks, {})
        self._state = np.full(0x110000, _UNSEEN, dtype=np.uint8)
        self._state[:128] = _SAME
        self._state[0xD800:0xE000] = _DOUBTFUL  # halves of surrogate pairs
        self._state[[ord(char) for char in _BETWEEN]] = _DOUBTFUL

    def agree_on(self, text: str) -> bool:
        """Tell whether both split `text` in the same places."""
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        states = self._state[points]
        if (states == _UNSEEN).any():
            self._look_at(points[states == _UNSEEN])
            states = self._state[points]
        return not (states == _DOUBTFUL).any()

    def _look_at(self, points: npt.NDArray[np.uint32]) -> None:
        for point in np.unique(points):
            text = f"x{chr(point)} 1{chr(point)} .{chr(point)} "
            same = self._gigatoken.encode(text).tolist() == self._tiktoken.encode_ordinary(text)
            self._state[point] = _SAME if same else _DOUBTFUL


_kinds = cache(Kinds)  # found out when first needed


def _backend(ranks: Ranks | Path, specials: dict[str, int]) -> Any:
    """Return gigatoken's encoder for ranks; special tokens are such wherever they stand."""
    from gigatoken.gigatoken_rs import BPETokenizer

    if isinstance(ranks, Path):
        return BPETokenizer.from_tiktoken(ranks, "gpt2", specials)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ranks.tiktoken"
        path.write_bytes(dump_ranks(ranks))
        return BPETokenizer.from_tiktoken(path, "gpt2", specials)
