"""Texts to ids, in this process or in several, in the order they came.

Workers get batches of texts and send back ids, so one large file keeps every core busy, and what
is written cannot depend on how many there are. Knows nothing of files.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context
from types import TracebackType
from typing import Self

from gptcli.data import shards, worker
from gptcli.data.units import Unit
from gptcli.data.worker import Encoded
from gptcli.errors import DataError, GptError, MemoryLimitError
from gptcli.tokenizers import Tokenizer, UnknownCharacters


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


class Encoder:
    """Encodes batches with a number of worker processes; a context manager, which ends them."""

    def __init__(self, tokenizer: Tokenizer, workers: int) -> None:
        self._tokenizer = tokenizer
        self._dtype = shards.dtype_for(tokenizer.vocab_size)
        self._most_waiting = 0
        self._pool: Executor | None = None
        if workers > 1:
            self._most_waiting = 2 * workers  # enough to keep all of them busy
            self._pool = ProcessPoolExecutor(
                workers,
                # Spawned, not forked: the same on every system, and safe beside threads.
                mp_context=get_context("spawn"),
                initializer=worker.start,
                initargs=(tokenizer.definition(), self._dtype),
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
            return self._pool.submit(worker.encode, texts)
        future: Future[Encoded] = Future()
        try:
            future.set_result(worker.encode_batch(self._tokenizer, self._dtype, texts))
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
