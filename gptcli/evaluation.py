"""The loss of a network on text: every token scored once, in nats, with its bytes counted.

Sums run over tokens and are divided once, so batches never weigh differently. Knows nothing of
files or terminals.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt
import torch

from gptcli.device import Compute
from gptcli.model import GPT
from gptcli.model.loss import IGNORED

# Tokens of one batch on a CPU: what they need stays near the processor's caches.
_TOKENS_PER_BATCH = 4096
# Logits of one batch, in elements: bounds memory at any vocabulary and context (256 MB float32).
_LOGITS_PER_BATCH = 1 << 26


class TokenSequence(Protocol):
    """Tokens that can be read anywhere: a split of a data folder, or a text in memory."""

    def __len__(self) -> int: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def read(self, start: int, count: int) -> npt.NDArray[np.unsignedinteger]:
        """Return `count` tokens from `start` on."""
        ...


@dataclass(frozen=True)
class TokenArray:
    """Tokens in memory, (n,)."""

    tokens: npt.NDArray[np.unsignedinteger]

    def __len__(self) -> int:
        return len(self.tokens)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def read(self, start: int, count: int) -> npt.NDArray[np.unsignedinteger]:
        """Return `count` tokens from `start` on."""
        return self.tokens[start : start + count]


@dataclass(frozen=True)
class Evaluation:
    """The result of scoring tokens.

    Attributes:
        loss: Mean negative log-likelihood, nats per token.
        tokens: Tokens scored.
        bytes: Bytes of text they stand for; end-of-text stands for none.
        context: Most tokens the network saw before a scored one.
        stride: Tokens scored by each window but the first.
    """

    loss: float
    tokens: int
    bytes: int
    context: int
    stride: int

    @property
    def perplexity(self) -> float:
        """The exponential of the loss, per token."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits the network needs for each byte of the text: comparable across tokenizers."""
        return self.loss * self.tokens / math.log(2) / self.bytes if self.bytes else math.nan


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


def n_windows(n_tokens: int, context: int, stride: int) -> int:
    """Return how many windows score all of `n_tokens` tokens."""
    return 1 + max(0, math.ceil((n_tokens - 1 - context) / stride))


@torch.no_grad()
def evaluate(
    model: GPT,
    tokens: TokenSequence,
    compute: Compute,
    *,
    context: int,
    stride: int | None = None,
    max_tokens: int | None = None,
    token_lengths: npt.NDArray[np.int64] | None = None,
    stopped: Callable[[], bool] = lambda: False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation | None:
    """Score tokens.

    Args:
        model: The network; its mode is restored afterwards.
        tokens: At least two.
        compute: Where the network lives, and its precision.
        context: Window length.
        stride: Tokens between window starts; `context` if None.
        max_tokens: Score about this many, in evenly spaced windows; all if None.
        token_lengths: Bytes of each token, (V,), to count bytes.
        stopped: Asked between batches; if true, None is returned.
        on_progress: Called with (windows done, windows in all).
    """
    assert len(tokens) >= 2 and 1 <= (stride or context) <= context
    stride = stride or context
    total = n_windows(len(tokens), context, stride)
    chosen = min(total, max(1, max_tokens // stride)) if max_tokens else total
    window = windows(len(tokens), context, stride)
    assert model.config.vocab_size is not None
    n_tokens = _LOGITS_PER_BATCH // model.config.vocab_size
    if compute.device.type == "cpu":
        n_tokens = min(n_tokens, _TOKENS_PER_BATCH)
    rows = max(1, n_tokens // context)
    was_training = model.training
    model.eval()
    loss, n_scored, n_bytes, done = 0.0, 0, 0, 0
    try:
        for batch in _batches((window(i * total // chosen) for i in range(chosen)), rows):
            if stopped():
                return None
            inputs, targets = _read(tokens, batch)
            with compute.autocast():
                output = model(inputs.to(compute.device), targets.to(compute.device))
            loss += float(output.loss)
            scored = targets[targets != IGNORED]
            n_scored += scored.numel()
            if token_lengths is not None:
                n_bytes += int(token_lengths[scored.numpy()].sum())
            done += len(batch)
            on_progress(done, chosen)
    finally:
        model.train(was_training)
    return Evaluation(loss / n_scored, n_scored, n_bytes, context, stride)


def _batches(found: Iterator[Window], rows: int) -> Iterator[list[Window]]:
    """Group consecutive windows of equal length, up to `rows` of them."""
    batch: list[Window] = []
    for window in found:
        if batch and (len(batch) == rows or batch[0].length != window.length):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _read(tokens: TokenSequence, batch: list[Window]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return inputs and targets (B, T) of windows of one length."""
    raw = np.stack([tokens.read(w.start, w.length + 1) for w in batch]).astype(np.int64)
    rows = torch.from_numpy(raw)
    inputs, targets = rows[:, :-1], rows[:, 1:].clone()
    for row, window in zip(targets, batch, strict=True):
        row[: window.length - window.n_scored] = IGNORED
    return inputs, targets
