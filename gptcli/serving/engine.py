"""Requests are decoded together: one thread owns the models, texts join and leave at any token.

The thread never waits for a client; a client that is slow finds more text at once.
"""

import asyncio
import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from gptcli.config import GenerateConfig
from gptcli.errors import GptError
from gptcli.generation.decode import Drawn, Row
from gptcli.generation.text import Piece, Sample
from gptcli.serving.models import Model

_log = logging.getLogger("gptcli")
# Pieces of streams leave at its multiples, of all at once, as each wakes a thread that takes a core
# from decoding. It is faster than anyone reads.
_FLUSH_SECONDS = 0.04
_JOIN_SECONDS = 0.02  # by which others' next tokens are late, when many texts join


class Busy(Exception):
    """No more requests can wait; `seconds` say when to try again."""

    def __init__(self, seconds: int) -> None:
        super().__init__(seconds)
        self.seconds = seconds


@dataclass(eq=False)
class Job:
    """A request: its texts, and how its handler hears of them."""

    model: Model
    texts: list[Sample]
    ends_at: float  # by time.monotonic
    is_streamed: bool
    loop: asyncio.AbstractEventLoop
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    pieces: deque[Piece] = field(default_factory=deque)
    error: Exception | None = None
    is_cancelled: bool = False
    is_done: bool = False
    first_token_at: float | None = None
    flush_at: float = 0.0
    waiting: deque[Sample] = field(init=False)

    def __post_init__(self) -> None:
        self.waiting = deque(self.texts)

    @property
    def n_tokens(self) -> int:
        """Tokens drawn so far."""
        return sum(text.text.n_tokens for text in self.texts)


def make_texts(
    model: Model,
    prompts: Sequence[list[int]],
    config: GenerateConfig,
    *,
    n: int,
    seed: int,
    n_top: int | None,
) -> list[Sample]:
    """Return `n` texts of each prompt; number k of a prompt is sample k of `gpt generate`."""
    tokenizer = model.trained.tokenizer
    return [
        Sample(
            index * n + number,
            Row(list(prompt), config, tokenizer.ends, seed, number, n_top),
            tokenizer,
        )
        for index, prompt in enumerate(prompts)
        for number in range(n)
    ]


class Engine:
    """Decodes the texts of all requests.

    Attributes:
        most_texts: The most that a request can have.
        is_draining: Whether new requests are turned away.
    """

    def __init__(self, *, max_texts: int, max_waiting: int) -> None:
        """Start the thread.

        Args:
            max_texts: Texts that are decoded together.
            max_waiting: Further texts that may wait for a place.
        """
        self._max_texts, self._max_waiting = max_texts, max_waiting
        self.most_texts = max_texts + max_waiting
        self._lock = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: dict[Row, tuple[Sample, Job]] = {}
        self._is_closed = self._is_ending = self.is_draining = False
        self._seconds_per_text = 1.0  # lately, for Retry-After
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    @property
    def n_running(self) -> int:
        """Texts that grow."""
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        """Texts that wait for a place."""
        return sum(len(job.waiting) for job in list(self._waiting))

    def submit(self, job: Job) -> None:
        """Let a request wait for its places.

        Raises:
            Busy: Too many wait, or the server is about to end.
        """
        with self._lock:
            n_free = self._max_texts - len(self._running)
            n_waiting = sum(len(other.waiting) for other in self._waiting)
            if self.is_draining or n_waiting + len(job.texts) > self._max_waiting + n_free:
                raise Busy(self._wait_seconds())
            self._waiting.append(job)
            self._lock.notify()

    async def pieces(self, job: Job) -> AsyncIterator[list[Piece]]:
        """Yield what the texts of a request grew by, until all are complete.

        Raises:
            Exception: What made decoding fail.
        """
        is_done = False
        while not is_done:
            await job.changed.wait()
            job.changed.clear()
            is_done = job.is_done
            if found := [job.pieces.popleft() for _ in range(len(job.pieces))]:
                yield found
            if job.error is not None:
                raise job.error

    def cancel(self, job: Job) -> None:
        """Free the places of a request, also of one that is done."""
        with self._lock:
            job.is_cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
            self._lock.notify()

    def end_all(self) -> None:
        """End every text where it is now."""
        with self._lock:
            self._is_ending = True
            self._lock.notify()

    def close(self) -> None:
        """End the thread."""
        with self._lock:
            self._is_closed = True
            self._lock.notify()
        self._thread.join(timeout=30)

    def _work(self) -> None:
        while True:
            with self._lock:
                while not (self._waiting or self._running or self._is_closed):
                    self._lock.wait()
                if self._is_closed:
                    return
            try:
                self._turn()
            except Exception as error:  # a bug: all requests fail, and the next ones are served
                with self._lock:
                    jobs = {*self._waiting, *(job for _, job in self._running.values())}
                for job in jobs:
                    job.model.rows.clear()
                    self._fail(job, error, set())
                self._wake(jobs)

    def _turn(self) -> None:
        """Let texts leave and join, and extend all by one token."""
        touched, joins_until = set[Job](), time.monotonic() + _JOIN_SECONDS
        with self._lock:
            self._end_overdue(touched)
        while time.monotonic() < joins_until:
            with self._lock:
                admitted = self._next()
            if admitted is None:
                break
            self._join(*admitted, touched)
            self._wake(touched)  # a first token does not wait for the others' next
        models = {job.model: None for _, job in self._running.values()}
        for model in models:
            self._step(model, touched)
        self._wake(touched)

    def _next(self) -> tuple[Job, list[Sample]] | None:
        """Return the texts to join next: those of one prompt, as many as there is room for."""
        for job in self._waiting:
            n_free = min(
                self._max_texts - len(self._running), job.model.max_rows - len(job.model.rows.rows)
            )
            if n_free <= 0:
                continue
            first, texts = job.waiting[0], list[Sample]()
            while job.waiting and len(texts) < n_free and (
                job.waiting[0].row.tokens == first.row.tokens
            ):  # fmt: skip
                texts.append(job.waiting.popleft())
            if not job.waiting:
                self._waiting.remove(job)
            return job, texts
        return None

    def _join(self, job: Job, texts: list[Sample], touched: set[Job]) -> None:
        for text in texts:
            self._running[text.row] = text, job
        try:
            drawn = job.model.rows.join([text.row for text in texts])
        except Exception as error:
            self._fail(job, error, touched)
            return
        now = time.monotonic()
        job.first_token_at = job.first_token_at or now
        for text in texts:
            text.began = now
        self._take(drawn, touched)

    def _step(self, model: Model, touched: set[Job]) -> None:
        try:
            self._take(model.rows.step(), touched)
        except Exception as error:
            for job in {job for _, job in self._running.values() if job.model is model}:
                self._fail(job, error, touched)
            model.rows.clear()

    def _take(self, drawn: list[Drawn], touched: set[Job]) -> None:
        for one in drawn:
            text, job = self._running[one.row]
            touched.add(job)
            if text.push(one):
                self._leave(text)
                seconds = time.monotonic() - text.began
                self._seconds_per_text += 0.1 * (seconds - self._seconds_per_text)

    def _leave(self, text: Sample) -> None:
        _, job = self._running.pop(text.row)
        if text.row in job.model.rows.rows:
            job.model.rows.leave(text.row)

    def _end_overdue(self, touched: set[Job]) -> None:
        """Let texts leave whose client is gone or whose time is over."""
        now = time.monotonic()
        for text, job in list(self._running.values()):
            if job.is_cancelled or self._is_ending or now > job.ends_at:
                text.finish("length")
                self._leave(text)
                touched.add(job)
        for job in [job for job in self._waiting if self._is_ending or now > job.ends_at]:
            self._waiting.remove(job)
            if job.first_token_at is None:
                job.error = Busy(self._wait_seconds())
            for text in job.waiting:
                text.finish("length")
            job.waiting.clear()
            touched.add(job)

    def _wait_seconds(self) -> int:
        return max(1, min(60, round(self._seconds_per_text)))

    def _fail(self, job: Job, error: Exception, touched: set[Job]) -> None:
        if not isinstance(error, GptError):
            _log.warning("".join(traceback.format_exception(error)))
        job.error = error
        with self._lock:
            if job in self._waiting:
                self._waiting.remove(job)
        for text in [text for text, other in self._running.values() if other is job]:
            self._leave(text)
        touched.add(job)

    def _wake(self, jobs: set[Job]) -> None:
        """Hand over what is new; a stream that had some a moment ago waits for more."""
        now, awake = time.monotonic(), list[Job]()
        for job in jobs:
            is_done = job.error is not None or all(text.finish_reason for text in job.texts)
            if not is_done and (not job.is_streamed or now < job.flush_at):
                continue
            job.flush_at = (now // _FLUSH_SECONDS + 1) * _FLUSH_SECONDS
            job.pieces.extend(piece for text in job.texts if (piece := text.take()))
            job.is_done = is_done
            if job.pieces or is_done:
                awake.append(job)
        if awake and not (loop := awake[0].loop).is_closed():  # the one that serves all
            loop.call_soon_threadsafe(_set_all, awake)


def _set_all(jobs: list[Job]) -> None:
    for job in jobs:
        job.changed.set()
