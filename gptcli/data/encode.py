"""Encode texts to ids, in one process or several, in order.

Workers receive batches of texts and return ids, so one large file keeps every core busy, and the
result does not depend on their number.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from types import TracebackType
from typing import Self

import numpy as np

from gptcli.data import shards, worker
from gptcli.data.units import Unit
from gptcli.data.worker import Encoded
from gptcli.errors import DataError, GptError, MemoryLimitError
from gptcli.tokenizers import Tokenizer, UnknownCharacters
from gptcli.tokenizers.gigatoken import FastBpe, fast_bpe

_COMPARED_CHARS = 1 << 20  # in which gigatoken has to prove itself


@dataclass(frozen=True)
class TextBatch:
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


class Encoder:
    """Encodes batches, in worker processes or by gigatoken; a context manager, which ends them.

    gigatoken is used where it is installed, and as long as it gives tiktoken's ids on the first
    texts; it is so fast that one thread of it does.
    """

    def __init__(self, tokenizer: Tokenizer, workers: int) -> None:
        self._tokenizer = tokenizer
        self._dtype = shards.dtype_for(tokenizer.vocab_size)
        self._workers = workers
        self._fast = fast_bpe(tokenizer)
        self._to_compare = _COMPARED_CHARS if self._fast else 0
        self._pool: Executor | None = None

    def encode(self, batches: Iterable[TextBatch | None]) -> Iterator[tuple[TextBatch, Encoded]]:
        """Yield each batch with what it became, in their order.

        Args:
            batches: What to encode; a None says that the next one will be long in coming, so
                what has been given is to be finished first. So it is when they end in an error.

        Raises:
            DataError: The vocabulary has no token for part of a text.
            MemoryLimitError: A worker was killed.
        """
        waiting: deque[tuple[TextBatch, Future[Encoded]]] = deque()
        failure: GptError | None = None
        try:
            for batch in _until_failure(batches):
                if isinstance(batch, GptError):
                    failure = batch
                elif batch is not None:
                    waiting.append((batch, self._submit(batch.texts)))
                busy = self._pool is not None and batch is not None
                while len(waiting) > (2 * self._workers if busy else 0):  # none of them idle
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
        if self._to_compare > 0 or (self._fast is None and self._workers == 1):
            return self._encode_here(texts)
        if self._pool is None:
            self._pool = self._make_pool()
        if self._fast is not None:
            return self._pool.submit(self._encode_fast, self._fast, texts)
        return self._pool.submit(worker.encode, texts)

    def _make_pool(self) -> Executor:
        if self._fast is not None:
            return ThreadPoolExecutor(1)
        return ProcessPoolExecutor(
            self._workers,
            # Spawned, not forked: the same on every system, and safe beside threads.
            mp_context=get_context("spawn"),
            initializer=worker.init_worker,
            initargs=(self._tokenizer.definition(), self._dtype),
        )

    def _encode_here(self, texts: list[str]) -> Future[Encoded]:
        future: Future[Encoded] = Future()
        try:
            encoded = worker.encode_batch(self._tokenizer, self._dtype, texts)
            future.set_result(encoded)
        except UnknownCharacters as error:
            future.set_exception(error)
            return future
        if self._fast is not None:
            self._to_compare -= sum(map(len, texts))
            fast = self._encode_fast(self._fast, texts)
            if fast.counts != encoded.counts or not np.array_equal(fast.ids, encoded.ids):
                self._fast, self._to_compare = None, 0
        return future

    def _encode_fast(self, fast: FastBpe, texts: list[str]) -> Encoded:
        return worker.pack(fast.encode(texts), self._dtype, texts)

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


def _until_failure(batches: Iterable[TextBatch | None]) -> Iterator[TextBatch | GptError | None]:
    """Yield the batches, and the error they end in, if they do."""
    try:
        yield from batches
    except GptError as error:
        yield error


def _result(batch: TextBatch, future: Future[Encoded]) -> tuple[TextBatch, Encoded]:
    try:
        return batch, future.result()
    except UnknownCharacters as error:
        raise DataError(f"{batch.unit.name}: {error.message}", error.hint) from error
