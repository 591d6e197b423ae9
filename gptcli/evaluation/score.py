"""The loss of a model on text: every token scored once, in nats, with its bytes counted.

Sums run over tokens and are divided once, so batches never weigh differently.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import numpy.typing as npt
import torch

from gptcli.config.windows import scoring_windows
from gptcli.data.shards import TokenReader
from gptcli.device import Runtime
from gptcli.errors import DataError
from gptcli.evaluation.metrics import MOST_SPANS, Evaluation, SpanSums, TokenStats, span_length
from gptcli.model import GPT
from gptcli.model.loss import IGNORED

if TYPE_CHECKING:
    from gptcli.data.loader import Split
    from gptcli.data.packing import PackedRows

# Tokens of one batch: on a CPU what they need stays near the processor's caches; a GPU is busy, and
# MPS within the largest array it has. Logits need no bound, for the loss works through them in
# chunks of its own.
_TOKENS_PER_BATCH = {"cpu": 4096, "cuda": 32768, "mps": 8192}
# Numbers of one batch's widest activation: 512 MB in float32.
_WIDEST = 1 << 27

SpanOf = Callable[[npt.NDArray[np.int64]], npt.NDArray[np.int64]]
Learn = Callable[[npt.NDArray[np.int64], npt.NDArray[np.bool_]], None]


class TokenSequence(Protocol):
    """Tokens that can be read anywhere: a split of a data folder, or a text in memory."""

    def __len__(self) -> int: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def read(self, start: int, count: int) -> npt.NDArray[np.unsignedinteger]:
        """Return `count` tokens from `start` on."""
        ...


@dataclass(frozen=True)
class TokenArray(TokenSequence):
    """Tokens in memory, (n,)."""

    tokens: npt.NDArray[np.unsignedinteger]

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, count: int) -> npt.NDArray[np.unsignedinteger]:
        """Return `count` tokens from `start` on."""
        return self.tokens[start : start + count]


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


def evaluate(
    model: GPT,
    tokens: TokenSequence,
    compute: Runtime,
    *,
    context: int,
    stride: int | None = None,
    max_tokens: int | None = None,
    units: TokenStats | None = None,
    span_of: SpanOf | None = None,
    rows: int | None = None,
    learn: Learn = lambda raw, scored: None,
    turn: tuple[int, int] = (0, 1),
    stopped: Callable[[], bool] = lambda: False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation | None:
    """Score tokens.

    Args:
        model: Its mode is restored afterwards.
        tokens: At least two.
        compute: Device and precision.
        context: Length of a window.
        stride: Tokens between the starts of windows; `context` if None.
        max_tokens: Score about this many, in evenly spaced windows; all if None.
        units: Counts bytes and words of the scored tokens; neither is counted if None.
        span_of: From positions (n,) to spans, to compare tokenizers; equally many tokens if None.
        rows: Windows scored together; as many as suit the device if None.
        learn: Called with what was scored: windows (B, T + 1), and which targets (B, T) count.
        turn: Rank and number of ranks that share the work, with equally many forward passes each.
        stopped: Asked between batches; if true, None is returned.
        on_progress: Called with (windows done, windows in all).
    """
    assert len(tokens) >= 2 and 1 <= (stride or context) <= context
    stride = stride or context
    chosen, total = scoring_windows(len(tokens), context, stride, max_tokens)
    window = windows(len(tokens), context, stride)
    evenly_spaced = (window(i * total // chosen) for i in range(chosen))
    rows, length = rows or _rows_together(model, compute, context), span_length(len(tokens))
    sums, last = SpanSums((len(tokens) - 2) // length + 1), np.array([len(tokens) - 1])
    paired = SpanSums(int(span_of(last)[0]) + 1) if span_of is not None else None
    done = 0
    with _in_eval_mode(model):
        for batch, counts in _batches(evenly_spaced, rows, turn):
            if stopped():
                return None
            raw = np.stack([tokens.read(w.start, w.length + 1) for w in batch]).astype(np.int64)
            scored, positions = _targets(batch)
            nats = _token_losses(model, raw, scored, compute)
            if not counts:
                continue
            learn(raw, scored)
            counted = units.count(raw[:, :-1][scored], raw[:, 1:][scored]) if units else ()
            sums.add((positions - 1) // length, nats[scored], *counted)
            if paired is not None and span_of is not None:
                paired.add(span_of(positions), nats[scored], *counted)
            done += len(batch)
            on_progress(done, chosen)
    return Evaluation(context, stride, sums, paired)


def evaluate_rows(
    model: GPT,
    rows: "PackedRows",
    compute: Runtime,
    *,
    max_tokens: int | None = None,
    units: TokenStats | None = None,
    n_spans: int | None = None,
    turn: tuple[int, int] = (0, 1),
    stopped: Callable[[], bool] = lambda: False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation | None:
    """Score what is trained on in conversations; arguments are those of `evaluate`.

    Args:
        rows: The conversations.
        max_tokens: Score rows of about this many tokens, evenly spaced; all if None.
        n_spans: Spans of neighboring conversations, at most one each; 256 if None.
    """
    chosen = min(rows.n_rows, max(1, max_tokens // rows.seq_len)) if max_tokens else rows.n_rows
    indices = [i * rows.n_rows // chosen for i in range(chosen)]
    size, (rank, world_size) = _rows_together(model, compute, rows.seq_len), turn
    batches = [indices[first : first + size] for first in range(0, chosen, size)]
    sums, done = SpanSums(min(n_spans or MOST_SPANS, len(rows.lengths))), 0
    with _in_eval_mode(model):
        for first in range(0, len(batches), world_size):
            if stopped():
                return None
            counts = first + rank < len(batches)  # else it is one more, as many as others have
            batch, numbers = rows.read(batches[first + rank if counts else first])
            with torch.no_grad(), compute.autocast():
                losses = model.token_losses(*(part.to(compute.device) for part in batch))
            if not counts:
                continue
            scored = (batch[1] != IGNORED).numpy()
            before, targets = (part.numpy()[scored] for part in batch[:2])
            spans = numbers[scored] * len(sums) // len(rows.lengths)
            counted = units.count(before, targets) if units else ()
            sums.add(spans, losses.cpu().numpy()[scored], *counted)
            done += len(losses)
            on_progress(done, chosen)
    return Evaluation(rows.seq_len, rows.seq_len, sums)


def evaluate_split(
    model: GPT, tokens: "Split", compute: Runtime, context: int, **how: Any
) -> Evaluation | None:
    """Score a split: text in windows of `context`, conversations in their rows."""
    if isinstance(tokens, TokenReader):
        return evaluate(model, tokens, compute, context=context, **how)
    return evaluate_rows(model, tokens, compute, **how)


def _rows_together(model: GPT, compute: Runtime, context: int) -> int:
    """Return how many rows suit the device."""
    n_tokens = min(_TOKENS_PER_BATCH[compute.device.type], _WIDEST // model.config.mlp_width)
    return max(1, n_tokens // context)


@contextmanager
def _in_eval_mode(model: GPT) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _batches(
    every_window: Iterable[Window], rows: int, turn: tuple[int, int]
) -> Iterator[tuple[list[Window], bool]]:
    """Yield a rank's batches of windows of equal length; if too few, one that does not count."""

    def batches() -> Iterator[list[Window]]:
        for _, alike in itertools.groupby(every_window, lambda window: window.length):
            while batch := list(itertools.islice(alike, rows)):
                yield batch

    (rank, world_size), every_batch = turn, batches()
    while dealt := list(itertools.islice(every_batch, world_size)):
        yield (dealt[rank], True) if rank < len(dealt) else (dealt[0], False)


def _targets(batch: list[Window]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.int64]]:
    """Return which targets (B, T) of windows of one length count, and where these are."""
    T = batch[0].length
    scored: npt.NDArray[np.bool_] = np.arange(T) >= np.array([[T - w.n_scored] for w in batch])
    positions = np.array([[w.start + 1] for w in batch]) + np.arange(T)
    return scored, positions[scored]


@torch.no_grad()
def _token_losses(
    model: GPT, raw: npt.NDArray[np.int64], scored: npt.NDArray[np.bool_], compute: Runtime
) -> npt.NDArray[np.float32]:
    """Return the loss of every token but the first of rows (B, T + 1), zero where not scored."""
    if (raw[:, 1:][scored] >= model.n_tokens).any():
        raise DataError(
            "the text has tokens that the model does not have, such as end-of-text",
            "score a text without them: --text FILE",
        )
    rows = torch.from_numpy(raw)
    targets = rows[:, 1:].masked_fill(torch.from_numpy(~scored), IGNORED)
    with compute.autocast():
        losses = model.token_losses(rows[:, :-1].to(compute.device), targets.to(compute.device))
    numbers: npt.NDArray[np.float32] = losses.cpu().numpy()
    return numbers
