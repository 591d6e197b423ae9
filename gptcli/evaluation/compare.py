"""One text, two models: the difference between them, and how sure it is.

Two models see the same text, so what makes a passage hard cancels: the interval of the difference
is much narrower than those of the two figures (paired comparison). Bits per byte are what models
with different tokenizers, and compressors, have in common.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gptcli.evaluation.metrics import MOST_SPANS, Evaluation, Sums, standard_error_of_sum

CONFIDENCE = 0.95
_SMALLEST_SPAN = 512  # bytes


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
    margin = error * student_t(CONFIDENCE, int(used.sum()) - 1)
    return Difference(difference, difference - margin, difference + margin)


def spans_of_bytes(n_bytes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the span of the text in which each token ends, from the bytes of each (n,)."""
    ends = np.cumsum(n_bytes)
    length = max(_SMALLEST_SPAN, math.ceil(int(ends[-1]) / MOST_SPANS))
    return np.maximum(ends - 1, 0) // length


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
    return mean, student_t(CONFIDENCE, n - 1) * statistics.stdev(values) / math.sqrt(n)
