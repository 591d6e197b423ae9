"""What a process that only tokenizes needs, and no more, so that it starts quickly."""

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import connection, parent_process
from typing import Any

import numpy as np
import numpy.typing as npt

from gptcli.tokenizers import Ids, Tokenizer, tokenizer_from

Tokens = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class Encoded:
    """The ids of a batch of texts: all in a row, and how many and of how many bytes each."""

    ids: Tokens
    counts: list[int]
    n_bytes: list[int]

    def __iter__(self) -> Iterator[tuple[Tokens, int]]:
        """Yield (ids, bytes) of each text."""
        start = 0
        for count, n_bytes in zip(self.counts, self.n_bytes, strict=True):
            yield self.ids[start : start + count], n_bytes
            start += count


def encode_batch(tokenizer: Tokenizer, dtype: str, texts: list[str]) -> Encoded:
    """Encode texts one by one; none affects another's ids.

    Args:
        tokenizer: Which ids.
        dtype: numpy's name of the type that holds them.
        texts: Any texts, (n,).

    Raises:
        UnknownCharacters: The vocabulary has no token for part of a text.
    """
    return pack([tokenizer.encode(text) for text in texts], dtype, texts)


def pack(found: list[Ids], dtype: str, texts: list[str]) -> Encoded:
    """Put the ids of each text together, as numpy's `dtype`."""
    counts = [len(ids) for ids in found]
    n_bytes = [len(text) if text.isascii() else len(text.encode()) for text in texts]
    ids = np.concatenate(found, dtype=dtype, casting="unsafe") if found else np.empty(0, dtype)
    return Encoded(ids, counts, n_bytes)


_tokenizer: Tokenizer
_dtype: str


def init_worker(definition: dict[str, Any], dtype: str) -> None:
    """Set up this process: its tokenizer, and an end together with its parent's."""
    global _tokenizer, _dtype
    _tokenizer, _dtype = tokenizer_from(definition), dtype
    # Ctrl-C reaches the whole group of processes; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Leave when the parent is gone, which a killed one cannot ask for."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def encode(texts: list[str]) -> Encoded:
    """Encode texts in a process that has been set up."""
    return encode_batch(_tokenizer, _dtype, texts)
