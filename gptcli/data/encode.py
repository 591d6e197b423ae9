"""Texts to ids, in this process or in several, in the order they came.

Workers get batches of texts and send back ids, so one large file keeps every core busy, and what
is written cannot depend on how many there are. Knows nothing of documents or files.
"""

import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from gptcli.errors import MemoryLimitError
from gptcli.tokenizers import Tokenizer, tokenizer_from


@dataclass(frozen=True)
class Encoded:
    """The ids of a batch of texts: all in a row (n,), and how many and of how many bytes each."""

    ids: npt.NDArray[np.unsignedinteger]
    counts: list[int]
    n_bytes: list[int]

    def __iter__(self) -> Iterator[tuple[npt.NDArray[np.unsignedinteger], int]]:
        """Yield (ids, bytes) of each text."""
        start = 0
        for count, n_bytes in zip(self.counts, self.n_bytes, strict=True):
            yield self.ids[start : start + count], n_bytes
            start += count


class Encoder:
    """Encodes batches with a number of worker processes; a context manager, which ends them."""

    def __init__(self, tokenizer: Tokenizer, workers: int) -> None:
        self._tokenizer = tokenizer
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None
        if workers > 1:
            self._pool = ProcessPoolExecutor(
                workers,
                # Spawned, not forked: the same on every system, and safe beside threads.
                mp_context=get_context("spawn"),
                initializer=_start_worker,
                initargs=(tokenizer.definition(),),
            )

    def encode(self, batches: Iterable[list[str]]) -> Iterator[Encoded]:
        """Yield what each batch became, in the order of the batches.

        Raises:
            UnknownCharacters: The vocabulary has no token for part of a text.
            MemoryLimitError: A worker was killed.
        """
        if self._pool is None:
            for batch in batches:
                yield encode_batch(self._tokenizer, batch)
            return
        waiting: deque[Future[Encoded]] = deque()
        try:
            for batch in batches:
                waiting.append(self._pool.submit(_encode, batch))
                if len(waiting) > 2 * self._workers:  # enough to keep all of them busy
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise MemoryLimitError(
                "a tokenizing process was killed, most likely for want of memory",
                "run the command again with fewer --workers; finished files are kept",
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def encode_batch(tokenizer: Tokenizer, texts: list[str]) -> Encoded:
    """Encode texts one by one; none affects another's ids."""
    found = [tokenizer.encode(text) for text in texts]
    counts = [len(ids) for ids in found]
    n_bytes = [len(text) if text.isascii() else len(text.encode()) for text in texts]
    ids = np.concatenate(found) if found else np.empty(0, dtype=np.uint32)
    return Encoded(ids, counts, n_bytes)


_worker_tokenizer: Tokenizer


def _start_worker(definition: dict[str, Any]) -> None:
    """Set up a worker: its tokenizer, and an end together with its parent's."""
    global _worker_tokenizer
    _worker_tokenizer = tokenizer_from(definition)
    # Ctrl-C reaches the whole group of processes; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Leave when the parent is gone, which a killed one cannot ask for."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _encode(texts: list[str]) -> Encoded:
    found = encode_batch(_worker_tokenizer, texts)
    if _worker_tokenizer.vocab_size <= 1 << 16:  # half the bytes to send
        return Encoded(found.ids.astype(np.uint16), found.counts, found.n_bytes)
    return found
