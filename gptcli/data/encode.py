"""Encode texts to ids, in one process or several, in order.

Workers receive batches of texts and return ids, so one large file keeps every core busy, and the
result does not depend on their number. They import no more than this module and the tokenizers, so
they start quickly.
"""

import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from multiprocessing import connection, get_context, parent_process
from typing import TYPE_CHECKING, Any

import numpy as np

from gptcli.errors import DataError, GptError, MemoryLimitError
from gptcli.tokenizers import Ids, Tokenizer, Tokens, UnknownCharacters, dtype_for, tokenizer_from
from gptcli.tokenizers.gigatoken import fast_bpe

if TYPE_CHECKING:
    from gptcli.data.units import Unit

_COMPARED_CHARS = 1 << 20  # on which gigatoken has to give tiktoken's ids before it is trusted


@dataclass(frozen=True)
class TextBatch:
    """Texts of one unit to encode together."""

    unit: "Unit"
    texts: list[str]
    documents: list[int]  # the index of each text's document in the unit, never falling
    ends_unit: bool = False  # the unit's last batch, which may be empty
    # Of conversations, whose contents the texts are: an index into ROLES for each; of text -1.
    roles: list[int] = field(default_factory=list)
    # The reason and place of each row or document before the batch's end that is left out.
    skipped: list[tuple[str, str]] = field(default_factory=list)


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


class Encoder(AbstractContextManager["Encoder"]):
    """Encodes batches, in worker processes or a thread; a context manager, which ends them.

    gigatoken is used where it is installed, and as long as it gives tiktoken's ids on the first
    texts; it is so fast that one thread of it is enough.
    """

    def __init__(self, tokenizer: Tokenizer, workers: int) -> None:
        self._tokenizer, self._workers = tokenizer, workers
        self._fast = fast_bpe(tokenizer)
        self._to_compare = _COMPARED_CHARS if self._fast else 0
        self._pool: Executor | None = None

    def encode(self, batches: Iterable[TextBatch | None]) -> Iterator[tuple[TextBatch, Encoded]]:
        """Yield each batch with what it became, in their order.

        Args:
            batches: What to encode; a None says that the next one is far off, so that the batches
                before it are finished first. They are also finished if `batches` raises an error.

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
                is_alone = self._to_compare > 0 or (self._fast is None and self._workers == 1)
                # No worker is idle; without any, nothing that was read is lost at an interrupt.
                n_ahead = 0 if batch is None or is_alone else 2 * self._workers
                while len(waiting) > n_ahead:
                    yield _result(*waiting.popleft())
            while waiting:
                yield _result(*waiting.popleft())
        except BrokenProcessPool as error:
            raise MemoryLimitError(
                "a tokenizing process was killed, most likely for lack of memory",
                "run the command again with fewer --workers; finished files are kept",
            ) from error
        if failure is not None:
            raise failure

    def _submit(self, texts: list[str]) -> Future[Encoded]:
        if self._fast is not None or self._workers == 1:
            self._pool = self._pool or ThreadPoolExecutor(1)
        self._pool = self._pool or ProcessPoolExecutor(
            self._workers,
            # Spawned, not forked: the same on every system, and safe beside threads.
            mp_context=get_context("spawn"),
            initializer=_init_worker,
            initargs=(self._tokenizer.definition(),),
        )
        is_here = isinstance(self._pool, ThreadPoolExecutor)
        return self._pool.submit(self._encode if is_here else _encode_in_worker, texts)

    def _encode(self, texts: list[str]) -> Encoded:
        if self._fast is not None and self._to_compare <= 0:
            return _pack(self._fast.encode(texts), self._tokenizer, texts)
        encoded = _pack(list(map(self._tokenizer.encode, texts)), self._tokenizer, texts)
        if self._fast is not None:
            self._to_compare -= sum(map(len, texts))
            fast = _pack(self._fast.encode(texts), self._tokenizer, texts)
            if fast.counts != encoded.counts or not np.array_equal(fast.ids, encoded.ids):
                self._fast = None
        return encoded

    def __exit__(self, *error: object) -> None:
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


def _pack(ids: list[Ids], tokenizer: Tokenizer, texts: list[str]) -> Encoded:
    """Concatenate the ids of the texts, in the type of the shards."""
    dtype = dtype_for(tokenizer.vocab_size)
    n_bytes = [len(text) if text.isascii() else len(text.encode()) for text in texts]
    packed = np.concatenate(ids, dtype=dtype, casting="unsafe") if ids else np.empty(0, dtype)
    return Encoded(packed, [len(each) for each in ids], n_bytes)


_tokenizer: Tokenizer


def _init_worker(definition: dict[str, Any]) -> None:
    """Set up a worker: its tokenizer, and an end together with its parent's."""
    global _tokenizer
    _tokenizer = tokenizer_from(definition)
    # Ctrl-C reaches the whole group of processes; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exit when the parent is gone: one that is killed cannot ask for it."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _encode_in_worker(texts: list[str]) -> Encoded:
    return _pack(list(map(_tokenizer.encode, texts)), _tokenizer, texts)
