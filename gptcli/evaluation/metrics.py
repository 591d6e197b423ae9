"""What scoring gives: sums of nats, tokens, bytes and words, kept apart by spans of the text.

A span is what chance draws: the standard error is over spans, for the tokens within one are not
independent.
"""

import math

import numpy as np
import numpy.typing as npt

from gptcli.tokenizers import Tokenizer

Counts = npt.NDArray[np.int64]
Sums = npt.NDArray[np.float64]

MOST_SPANS = 256  # of a text: enough for the interval, each long enough to be independent
_SMALLEST_SPAN = 128  # tokens


def span_length(n_tokens: int) -> int:
    """Return the tokens of a span: the same for the same text, whatever scores it, and how."""
    return max(_SMALLEST_SPAN, math.ceil(n_tokens / MOST_SPANS))


class TokenStats:
    """Counts the bytes and words of tokens; end-of-text has none.

    Words are what ASCII white space separates, as in `bytes.split`. A word that continues from the
    token before is that token's, so counts of neighbors add up to those of the whole text.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        texts = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self._bytes = np.array([len(text) for text in texts], dtype=np.int64)
        self._words = np.array([len(text.split()) for text in texts], dtype=np.int64)
        self._starts_word = np.array([bool(text[:1].strip()) for text in texts])
        self._ends_word = np.array([bool(text[-1:].strip()) for text in texts])

    def count(self, before: Counts, tokens: Counts) -> tuple[Counts, Counts]:
        """Return the bytes and the words of each token, (n,) each.

        Args:
            before: The token before each, (n,).
            tokens: (n,).
        """
        continues = self._ends_word[before] & self._starts_word[tokens]
        return self._bytes[tokens], self._words[tokens] - continues


class SpanSums:
    """Sums of nats, tokens, bytes and words for each span of the text, (n_spans,) each."""

    def __init__(self, sums: Sums | None = None) -> None:
        self._set(np.zeros((4, 0)) if sums is None else sums)

    def _set(self, sums: Sums) -> None:
        self._sums = sums
        self.nats, self.tokens, self.bytes, self.words = sums  # views

    def __len__(self) -> int:
        return self._sums.shape[1]

    def padded(self, n: int) -> "SpanSums":
        """Return the sums with empty spans after them, `n` in all."""
        return SpanSums(np.pad(self._sums, ((0, 0), (0, n - len(self)))))

    def add(
        self,
        spans: Counts,
        nats: npt.NDArray[np.float32],
        n_bytes: Counts | None = None,
        n_words: Counts | None = None,
    ) -> None:
        """Add scored tokens: the span of each, its loss, its bytes and its words, (n,) each."""
        if not len(spans):
            return
        first, end = int(spans.min()), int(spans.max()) + 1
        if end > len(self):  # doubling, so that a long text is not copied with every batch
            self._set(np.pad(self._sums, ((0, 0), (0, max(end - len(self), len(self))))))
        ones = np.ones(len(spans))
        for sums, values in zip(self._sums, (nats, ones, n_bytes, n_words), strict=True):
            if values is not None:
                sums[first:end] += np.bincount(spans - first, weights=values)


class Evaluation:
    """The result of scoring tokens.

    Attributes:
        context: The most tokens the model saw before a scored one.
        stride: Tokens scored by each window but the first.
        spans: The sums behind the figures, for each span of the text.
        paired: The same for the spans that a comparison is over.
    """

    def __init__(
        self, context: int, stride: int, spans: SpanSums, paired: SpanSums | None = None
    ) -> None:
        self.context, self.stride, self.spans = context, stride, spans
        self.paired = paired or spans

    @property
    def nats(self) -> float:
        """Negative log-likelihood of all scored tokens."""
        return math.fsum(self.spans.nats)

    @property
    def tokens(self) -> int:
        """Tokens scored."""
        return int(self.spans.tokens.sum())

    @property
    def bytes(self) -> int:
        """Bytes of text of the scored tokens."""
        return int(self.spans.bytes.sum())

    @property
    def words(self) -> int:
        """Words of text that begin in the scored tokens."""
        return int(self.spans.words.sum())

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood, nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """The exponential of the loss, per token."""
        return _exp(self.loss)

    @property
    def word_perplexity(self) -> float:
        """The exponential of the nats per word: comparable across tokenizers."""
        return _exp(self.nats / self.words) if self.words else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Bits the model needs for each byte of the text: comparable across tokenizers."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def standard_error(self) -> float:
        """Standard error of the loss, in nats per token; not a number with a single span."""
        residuals = self.spans.nats - self.loss * self.spans.tokens
        return standard_error_of_sum(residuals[self.spans.tokens > 0]) / self.tokens


def standard_error_of_sum(residuals: Sums) -> float:
    """Return the standard error of a sum of independent parts, from what remains of each.

    Divided by a total it is that of a ratio of two sums (Cochran 1977, chapter 6).

    Args:
        residuals: The sum of each part minus what the ratio predicts for it, (n,).
    """
    n = len(residuals)
    return math.sqrt(n / (n - 1) * float(np.square(residuals).sum())) if n > 1 else math.nan


def _exp(nats: float) -> float:
    return math.inf if nats >= 700 else math.exp(nats)
