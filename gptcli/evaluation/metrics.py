"""What scoring gives: sums of nats, tokens, bytes and words, kept apart by parts of the text.

A part of the text, a span, is what chance draws: the standard error is over spans, for the tokens
within one are not independent. Knows nothing of networks.
"""

import math

import numpy as np
import numpy.typing as npt

from gptcli.tokenizers import Tokenizer

Counts = npt.NDArray[np.int64]


MOST_SPANS = 256  # of a text: enough for the interval, each long enough to be independent
_SMALLEST_SPAN = 128  # tokens


def span_length(n_tokens: int) -> int:
    """Return the tokens of a span: the same for the same text, whatever scores it, and how."""
    return max(_SMALLEST_SPAN, math.ceil(n_tokens / MOST_SPANS))


class TokenStats:
    """Counts the bytes and words that tokens stand for; end-of-text stands for none.

    Words are what ASCII white space separates, as in `bytes.split`. A word that goes on from the
    token before is that token's, so counts of neighbours add up to the whole text's.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        texts = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self._bytes = np.array([len(text) for text in texts], dtype=np.int64)
        self._words = np.array([len(text.split()) for text in texts], dtype=np.int64)
        self._starts = np.array([bool(text[:1].strip()) for text in texts])
        self._ends = np.array([bool(text[-1:].strip()) for text in texts])

    @property
    def bytes(self) -> Counts:
        """The bytes of every token, (vocab_size,)."""
        return self._bytes

    def count(self, before: Counts, tokens: Counts) -> tuple[Counts, Counts]:
        """Return the bytes and the words of each token, (n,) each.

        Args:
            before: The token before each, (n,).
            tokens: (n,).
        """
        goes_on = self._ends[before] & self._starts[tokens]
        return self._bytes[tokens], self._words[tokens] - goes_on


class SpanSums:
    """Sums for each span of the text, (n_spans,) each, that grow as spans are met."""

    def __init__(self) -> None:
        self.nats: npt.NDArray[np.float64] = np.zeros(0)
        self.tokens: npt.NDArray[np.float64] = np.zeros(0)
        self.bytes: npt.NDArray[np.float64] = np.zeros(0)
        self.words: npt.NDArray[np.float64] = np.zeros(0)

    def add(
        self,
        spans: Counts,
        nats: npt.NDArray[np.float32],
        n_bytes: Counts | None = None,
        n_words: Counts | None = None,
    ) -> None:
        """Add scored tokens: the span of each, its loss, its bytes and its words, (n,) each."""
        self.nats = _added(self.nats, spans, nats)
        self.tokens = _added(self.tokens, spans, None)
        if n_bytes is not None and n_words is not None:
            self.bytes = _added(self.bytes, spans, n_bytes)
            self.words = _added(self.words, spans, n_words)


def _added(
    sums: npt.NDArray[np.float64], spans: Counts, values: npt.NDArray[np.generic] | None
) -> npt.NDArray[np.float64]:
    """Return sums with values added at their spans; sums is changed where it is long enough."""
    if not len(spans):
        return sums
    first = int(spans.min())
    added = np.bincount(spans - first, weights=values)
    end = first + len(added)
    if end > len(sums):  # doubling, so that a long text is not copied with every batch
        sums = np.concatenate([sums, np.zeros(max(end, 2 * len(sums)) - len(sums))])
    sums[first:end] += added
    return sums


class Evaluation:
    """The result of scoring tokens.

    Attributes:
        context: Most tokens the network saw before a scored one.
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
        """Bytes of text the scored tokens stand for."""
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
        return (
            standard_error_of_sum(
                (self.spans.nats - self.loss * self.spans.tokens)[self.spans.tokens > 0]
            )
            / self.tokens
        )


def standard_error_of_sum(residuals: npt.NDArray[np.float64]) -> float:
    """Return the standard error of a sum of independent parts, from what remains of each.

    Divided by a total it is that of a ratio of two sums (Cochran 1977, chapter 6).

    Args:
        residuals: Of each part, its sum minus what the ratio predicts for it, (n,).
    """
    n = len(residuals)
    return math.sqrt(n / (n - 1) * float(np.square(residuals).sum())) if n > 1 else math.nan


def _exp(nats: float) -> float:
    return math.inf if nats >= 700 else math.exp(nats)
