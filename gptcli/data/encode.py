"""Texts to ids, in this process or in several, in the order they came.

Workers get batches of texts and send back ids, so one large file keeps every core busy, and what
is written cannot depend on how many there are. Knows nothing of files.
"""

import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import connection, get_context, parent_process
from types import TracebackType
from typing import Any, Self

import numpy as np

from gptcli.data import shards
from gptcli.data.units import Unit
from gptcli.errors import DataError, GptError, MemoryLimitError
from gptcli.tokenizers import Tokenizer, UnknownCharacters, tokenizer_from


@dataclass(frozen=True)
class Batch:
    """Texts of one unit to encode together.

    Attributes:
        unit: The unit they come from.
        texts: The texts, (n,).
        documents: The index of each text's document in the unit, (n,), never falling.
        ends_unit: The unit's last batch, which may be empty.
    """

    unit: Unit
    texts: list[str]
    documents: list[int]
    ends_unit: bool = False


@dataclass(frozen=True)
class Encoded:
    """The ids of a batch's texts: all in a row, and how many and of how many bytes each."""

    ids: shards.Tokens
    counts: list[int]
    n_bytes: list[int]

    def __iter__(self) -> Iterator[tuple[shards.Tokens, int]]:
        """Yield (ids, bytes) of each text."""
        start = 0
        for count, n_bytes in zip(self.counts, self.n_bytes, strict=True):
            yield self.ids[start : start + count], n_bytes
            start += count


class Encoder:
    """Encodes batches with a number of worker processes; a context manager, which ends them."""

    def __init__(self, tokenizer: Tokenizer, workers: int) -> None:
        self._tokenizer = tokenizer
        self._most_waiting = 0
        self._pool: Executor | None = None
        if workers > 1:
            self._most_waiting = 2 * workers  # enough to keep all of them busy
            self._pool = ProcessPoolExecutor(
                workers,
                # Spawned, not forked: the same on every system, and safe beside threads.
                mp_context=get_context("spawn"),
                initializer=_start_worker,
                initargs=(tokenizer.definition(),),
            )

    def encode(self, batches: Iterable[Batch | None]) -> Iterator[tuple[Batch, Encoded]]:
        """Yield each batch with what it became, in their order.

        Args:
            batches: What to encode; a None says that the next one will be long in coming, so
                what has been given is to be finished first. So it is when they end in an error.

        Raises:
            DataError: The vocabulary has no token for part of a text.
            MemoryLimitError: A worker was killed.
        """
        waiting: deque[tuple[Batch, Future[Encoded]]] = deque()
        failure: GptError | None = None
        try:
            for batch in _until_failure(batches):
                if isinstance(batch, GptError):
                    failure = batch
                elif batch is not None:
                    waiting.append((batch, self._submit(batch.texts)))
                most = 0 if batch is None else self._most_waiting
                while len(waiting) > most:
                    yield _result(*waiting.popleft())
            while waiting:
                yield _result(*waiting.popleft())
        except BrokenProcessPool as error:
            raise MemoryLimitError(
                "a tokenizing process was killed, most likely for want of memory",
                "run the command again with fewer --workers; finished files are kept",
            ) from error
        if failure is not None:
            raise failure

    def _submit(self, texts: list[str]) -> Future[Encoded]:
        if self._pool is not None:
            return self._pool.submit(_encode, texts)
        future: Future[Encoded] = Future()
        try:
            future.set_result(encode_batch(self._tokenizer, texts))
        except UnknownCharacters as error:
            future.set_exception(error)
        return future

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


def _until_failure(batches: Iterable[Batch | None]) -> Iterator[Batch | GptError | None]:
    """Yield the batches, and the error they end in, if they do."""
    try:
        yield from batches
    except GptError as error:
        yield error


def _result(batch: Batch, future: Future[Encoded]) -> tuple[Batch, Encoded]:
    try:
        return batch, future.result()
    except UnknownCharacters as error:
        raise DataError(f"{batch.unit.name}: {error.message}", error.hint) from error


def encode_batch(tokenizer: Tokenizer, texts: list[str]) -> Encoded:
    """Encode texts one by one; none affects another's ids."""
    dtype = np.dtype(shards.dtype_for(tokenizer.vocab_size))
    found = [tokenizer.encode(text) for text in texts]
    counts = [len(ids) for ids in found]
    n_bytes = [len(text) if text.isascii() else len(text.encode()) for text in texts]
    ids = np.concatenate(found, dtype=dtype, casting="unsafe") if found else np.empty(0, dtype)
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
    return encode_batch(_worker_tokenizer, texts)
