"""The loss of a model on text: every token scored once, in nats, with its bytes counted.

Sums run over tokens and are divided once, so batches never weigh differently.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gptcli.config.windows import scoring_windows
from gptcli.data.loader import Batch
from gptcli.data.shards import TokenReader
from gptcli.device import Runtime
from gptcli.errors import DataError
from gptcli.evaluation.metrics import (
    MOST_SPANS,
    Counts,
    Evaluation,
    SpanSums,
    TokenStats,
    span_length,
)
from gptcli.model import GPT
from gptcli.model.loss import IGNORED

if TYPE_CHECKING:
    from gptcli.data.packing import PackedRows

# Tokens of one batch: on a CPU what they need stays near the processor's caches; a GPU is busy, and
# MPS within the largest array it has. Logits need no bound, for the loss works through them in
# chunks of its own.
_TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 32768, "mps": 8192}
# Numbers of one batch's widest activation: 512 MB in float32.
_WIDEST = 1 << 27

SpanOf = Callable[[Counts], Counts]
Learn = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class TokenArray(contextlib.AbstractContextManager[Any]):
    """Tokens in memory, (n,), read as those of a split are."""

    tokens: npt.NDArray[np.unsignedinteger]

    def __len__(self) -> int:
        return len(self.tokens)

    def __exit__(self, *error: object) -> None: ...

    def read(self, start: int, count: int) -> npt.NDArray[np.unsignedinteger]:
        """Return `count` tokens from `start` on."""
        return self.tokens[start : start + count]


TokenSequence = TokenReader | TokenArray


@dataclass(frozen=True)
class Window:
    """Inputs [start, start + length) whose last `n_scored` targets count."""

    start: int
    length: int
    n_scored: int


def windows(n_tokens: int, context: int, stride: int) -> Callable[[int], Window]:
    """Return the function from index to window of a sliding evaluation.

    The first window scores all its targets, each later one the `stride` it adds, so that every
    token but the text's first is scored exactly once.
    """
    n_targets = n_tokens - 1

    def window(index: int) -> Window:
        start = index * stride
        end = min(start + context, n_targets)
        scored_before = min(start - stride + context, n_targets) if index else 0
        return Window(start, end - start, end - scored_before)

    return window


class _Text:
    """The windows of a text as rows, and what is summed by the place of each target in it."""

    def __init__(
        self, tokens: TokenSequence, context: int, stride: int, span_of: SpanOf | None
    ) -> None:
        assert len(tokens) >= 2 and 1 <= stride <= context
        self._tokens, self.context, self.stride = tokens, context, stride
        self._window, length = windows(len(tokens), context, stride), span_length(len(tokens))
        self.n_rows = scoring_windows(len(tokens), context, stride)[1]
        spans: list[SpanOf] = [lambda places: (places - 1) // length]
        spans += [] if span_of is None else [span_of]
        last = np.array([len(tokens) - 1])
        self.sums = [(each, SpanSums(int(each(last)[0]) + 1)) for each in spans]

    def length(self, row: int) -> int:
        return self._window(row).length

    def read(self, rows: Sequence[int]) -> tuple[Batch, Counts]:
        """Return rows of one length as a batch, and where in the text each target (B, T) is."""
        batch, T = [self._window(row) for row in rows], self.length(rows[0])
        tokens = np.stack([self._tokens.read(w.start, T + 1) for w in batch]).astype(np.int64)
        scored = np.arange(T) >= np.array([[T - w.n_scored] for w in batch])
        raw = torch.from_numpy(tokens)
        targets = raw[:, 1:].masked_fill(torch.from_numpy(~scored), IGNORED)
        return (raw[:, :-1], targets), np.array([[w.start + 1] for w in batch]) + np.arange(T)


class _Conversations:
    """The rows of conversations, and what is summed by the conversation of each target."""

    def __init__(self, rows: "PackedRows", n_spans: int) -> None:
        self.context = self.stride = rows.seq_len
        self.n_rows, self.read, n = rows.n_rows, rows.read, len(rows.lengths)
        n_spans = min(n_spans, n)
        spans: SpanOf = lambda numbers: numbers * n_spans // n  # noqa: E731
        self.sums = [(spans, SpanSums(n_spans))]

    def length(self, row: int) -> int:
        return self.context


def evaluate(
    model: GPT,
    tokens: "TokenSequence | PackedRows",
    compute: Runtime,
    *,
    context: int,
    stride: int | None = None,
    max_tokens: int | None = None,
    units: TokenStats | None = None,
    span_of: SpanOf | None = None,
    n_spans: int = MOST_SPANS,
    rows: int | None = None,
    learn: Learn = lambda tokens, targets: None,
    turn: tuple[int, int] = (0, 1),
    stopped: Callable[[], bool] = lambda: False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation | None:
    """Score text in windows, or what is trained on in the rows of conversations.

    Args:
        model: Its mode is restored afterwards.
        tokens: At least two; or conversations.
        compute: Device and precision.
        context: Length of a window; rows of conversations have theirs.
        stride: Tokens between the starts of windows; `context` if None.
        max_tokens: Score about this many, in evenly spaced windows; all if None.
        units: Counts bytes and words of the scored tokens; neither is counted if None.
        span_of: From positions (n,) to spans, to compare tokenizers; equally many tokens if None.
        n_spans: Spans of neighboring conversations, at most one each.
        rows: Windows scored together; as many as suit the device if None.
        learn: Called with what was scored: tokens and targets, (B, T) each.
        turn: Rank and number of ranks that share the work, with equally many forward passes each.
        stopped: Asked between batches; if true, None is returned.
        on_progress: Called with (windows done, windows in all).
    """
    source: _Text | _Conversations
    if isinstance(tokens, TokenReader | TokenArray):
        source = _Text(tokens, context, stride or context, span_of)
    else:
        source = _Conversations(tokens, n_spans)
    total = source.n_rows
    chosen = min(total, max(1, max_tokens // source.stride)) if max_tokens else total
    evenly_spaced = (i * total // chosen for i in range(chosen))
    n_rows, done = rows or _rows_together(model, compute, source.context), 0
    with _in_eval_mode(model):
        for batch, counts in _batches(evenly_spaced, source.length, n_rows, turn):
            if stopped():
                return None
            parts, places = source.read(batch)
            losses = _token_losses(model, parts, compute)
            if not counts:
                continue
            learn(*parts[:2])
            scored = (parts[1] != IGNORED).numpy()
            counted = units.count(*(part.numpy()[scored] for part in parts[:2])) if units else ()
            for span_at, sums in source.sums:
                sums.add(span_at(places[scored]), losses[scored], *counted)
            done += len(batch)
            on_progress(done, chosen)
    return Evaluation(source.context, source.stride, *(sums for _, sums in source.sums))


def _rows_together(model: GPT, compute: Runtime, context: int) -> int:
    n_tokens = min(_TOKENS_PER_BATCH[compute.device.type], _WIDEST // model.config.mlp_width)
    return max(1, n_tokens // context)


@contextlib.contextmanager
def _in_eval_mode(model: GPT) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _batches(
    every_row: Iterable[int], length: Callable[[int], int], n_rows: int, turn: tuple[int, int]
) -> Iterator[tuple[list[int], bool]]:
    """Yield a rank's batches of rows of equal length; if too few, one that does not count."""

    def batches() -> Iterator[list[int]]:
        for _, alike in itertools.groupby(every_row, length):
            while batch := list(itertools.islice(alike, n_rows)):
                yield batch

    (rank, world_size), every_batch = turn, batches()
    while dealt := list(itertools.islice(every_batch, world_size)):
        yield (dealt[rank], True) if rank < len(dealt) else (dealt[0], False)


@torch.no_grad()
def _token_losses(model: GPT, batch: Batch, compute: Runtime) -> npt.NDArray[np.float32]:
    """Return the loss of every target (B, T), zero where it is not scored."""
    if bool((batch[1] >= model.n_tokens).any()):
        raise DataError(
            "the text has tokens that the model does not have, such as end-of-text",
            "score a text without them: --text FILE",
        )
    with compute.autocast():
        losses = model.token_losses(*(part.to(compute.device) for part in batch))
    numbers: npt.NDArray[np.float32] = losses.cpu().numpy()
    return numbers
