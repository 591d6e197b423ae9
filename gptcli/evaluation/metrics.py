"""What scoring gives: sums by spans of the text, the figures they make, and how sure these are.

A span is what chance draws: the standard error is over spans, for the tokens within one are not
independent. Two models see the same text, so what makes a passage hard cancels: the interval of
their difference is much narrower than those of the two figures (paired comparison).
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gptcli.tokenizers import Tokenizer

Counts = npt.NDArray[np.int64]
Sums = npt.NDArray[np.float64]

MOST_SPANS = 256  # of a text: enough for the interval, each long enough to be independent
_SMALLEST_SPAN = 128  # tokens
_SMALLEST_SPAN_BYTES = 512
_CONFIDENCE = 0.95  # of intervals


def span_length(n_tokens: int) -> int:
    """Return the tokens of a span: the same for the same text, whatever scores it, and how."""
    return max(_SMALLEST_SPAN, math.ceil(n_tokens / MOST_SPANS))


def spans_of_bytes(n_bytes: Counts) -> Counts:
    """Return the span of the text in which each token ends, from the bytes of each (n,)."""
    ends = np.cumsum(n_bytes)
    length = max(_SMALLEST_SPAN_BYTES, math.ceil(int(ends[-1]) / MOST_SPANS))
    return np.maximum(ends - 1, 0) // length


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
        """Return the bytes and the words of tokens (n,), given the token before each (n,)."""
        continues = self._ends_word[before] & self._starts_word[tokens]
        return self._bytes[tokens], self._words[tokens] - continues


class SpanSums:
    """Sums of nats, tokens, bytes and words for each span of the text, (n_spans,) each."""

    def __init__(self, n_spans: int) -> None:
        self._sums: Sums = np.zeros((4, n_spans))
        self.nats, self.tokens, self.bytes, self.words = self._sums

    def __len__(self) -> int:
        return len(self.nats)

    def add(
        self,
        spans: Counts,
        nats: npt.NDArray[np.float32],
        n_bytes: Counts | None = None,
        n_words: Counts | None = None,
    ) -> None:
        """Add scored tokens: the span of each, its loss, its bytes and its words, (n,) each."""
        ones = np.ones(len(spans))
        for sums, values in zip(self._sums, (nats, ones, n_bytes, n_words), strict=True):
            if values is not None:
                sums += np.bincount(spans, weights=values, minlength=len(self))

    def padded(self, n: int) -> "SpanSums":
        """Return the sums with empty spans after them, `n` in all."""
        longer = SpanSums(n)
        longer._sums[:, : len(self)] = self._sums
        return longer


class Evaluation:
    """The result of scoring tokens in windows of `context` tokens, `stride` apart."""

    def __init__(
        self, context: int, stride: int, spans: SpanSums, paired: SpanSums | None = None
    ) -> None:
        self.context, self.stride = context, stride
        self.paired = paired or spans  # the sums for each span that a comparison is over
        self.nats = math.fsum(spans.nats)  # negative log-likelihood of all scored tokens
        self.tokens = int(spans.tokens.sum())  # scored
        self.bytes = int(spans.bytes.sum())  # of their text
        self.words = int(spans.words.sum())  # that begin in them
        self.loss = _ratio(self.nats, self.tokens)  # nats per token
        self.perplexity = _exp(self.loss)
        # These two are comparable across tokenizers.
        self.word_perplexity = _exp(_ratio(self.nats, self.words))
        self.bits_per_byte = _ratio(self.nats / math.log(2), self.bytes)
        residuals = (spans.nats - self.loss * spans.tokens)[spans.tokens > 0]
        # Of the loss; not a number with a single span.
        self.standard_error = _ratio(standard_error_of_sum(residuals), self.tokens)


@dataclass(frozen=True)
class Difference:
    """Bits per byte of one model minus those of another; below zero, the first is better.

    `low` and `high` are the confidence interval; not numbers with a single span.
    """

    bits_per_byte: float
    low: float
    high: float

    @property
    def is_certain(self) -> bool:
        """Tell whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def paired_difference(first: Evaluation, second: Evaluation) -> Difference:
    """Return how many more bits per byte `first` needs than `second`.

    Both are scored with the same spans of the same text, perhaps with other tokenizers.
    """

    def residuals(score: Evaluation) -> tuple[Sums, npt.NDArray[np.bool_]]:
        """Return what each span adds to the bits per byte beyond its share, and which are used."""
        spans = score.paired.padded(max(len(first.paired), len(second.paired)))
        bits = spans.nats / math.log(2)
        return (bits - score.bits_per_byte * spans.bytes) / score.bytes, spans.tokens > 0

    difference = first.bits_per_byte - second.bits_per_byte
    (one, in_one), (other, in_other) = residuals(first), residuals(second)
    used = in_one | in_other
    error = standard_error_of_sum((one - other)[used])
    margin = error * student_t(_CONFIDENCE, int(used.sum()) - 1)
    return Difference(difference, difference - margin, difference + margin)


def standard_error_of_sum(residuals: Sums) -> float:
    """Return the standard error of a sum of independent parts, from their residuals (n,).

    These are the sum of each part minus what a ratio of two sums predicts for it; divided by a
    total, the standard error is that of the ratio (Cochran 1977, chapter 6).
    """
    n = len(residuals)
    return math.sqrt(n / (n - 1) * float(np.square(residuals).sum())) if n > 1 else math.nan


def student_t(confidence: float, freedom: int) -> float:
    """Return the two-sided quantile of Student's t; not a number without a degree of freedom.

    Exact for 1 and 2 of them, then by Cornish and Fisher's series (Abramowitz, Stegun 26.7.5).
    """
    if freedom < 3:
        exact = math.tan(math.pi * confidence / 2), math.sqrt(2 / (1 / confidence**2 - 1))
        return exact[freedom - 1] if freedom > 0 else math.nan
    z = statistics.NormalDist().inv_cdf((1 + confidence) / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return math.fsum(term / float(freedom) ** power for power, term in enumerate(terms))


def mean_and_margin(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and half of its confidence interval, which a single value does not have."""
    mean, n = math.fsum(values) / len(values), len(values)
    if n < 2 or not math.isfinite(mean):
        return mean, math.nan
    return mean, student_t(_CONFIDENCE, n - 1) * statistics.stdev(values) / math.sqrt(n)


def _ratio(total: float, count: int) -> float:
    return total / count if count else math.nan


def _exp(nats: float) -> float:
    return math.inf if nats >= 700 else math.exp(nats)
