"""The difference between two networks on one text, with its confidence interval.

Both see the same text, so what makes a passage hard cancels: the interval of the difference is
much narrower than those of the two figures (paired comparison). Bits per byte are what networks
with different tokenizers have in common.
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from gptcli.evaluation.metrics import MOST_SPANS, Evaluation, standard_error_of_sum

CONFIDENCE = 0.95
_SMALLEST_SPAN = 512  # bytes


@dataclass(frozen=True)
class Difference:
    """Bits per byte of one network minus those of another; below zero, the first is better.

    Attributes:
        bits_per_byte: The difference.
        low: Lower end of the confidence interval; not a number with a single span.
        high: Its upper end.
    """

    bits_per_byte: float
    low: float
    high: float

    @property
    def is_certain(self) -> bool:
        """Tell whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


def paired_difference(first: Evaluation, second: Evaluation) -> Difference:
    """Return how far `first` needs more bits per byte than `second`.

    Args:
        first: Scored with the same spans of the same text as `second`.
        second: As `first`; it may have another tokenizer.
    """
    difference = first.bits_per_byte - second.bits_per_byte
    n = max(len(first.paired.bytes), len(second.paired.bytes))
    residuals = _residuals(first, n) - _residuals(second, n)
    used = (_padded(first.paired.tokens, n) > 0) | (_padded(second.paired.tokens, n) > 0)
    error = standard_error_of_sum(residuals[used])
    margin = error * student_t(CONFIDENCE, int(used.sum()) - 1)
    return Difference(difference, difference - margin, difference + margin)


def _residuals(found: Evaluation, n: int) -> npt.NDArray[np.float64]:
    """Return what each span adds to the bits per byte beyond its share, (n,)."""
    bits = _padded(found.paired.nats, n) / math.log(2)
    return (bits - found.bits_per_byte * _padded(found.paired.bytes, n)) / found.bytes


def _padded(values: npt.NDArray[np.float64], n: int) -> npt.NDArray[np.float64]:
    return np.pad(values, (0, n - len(values)))


def spans_of_bytes(n_bytes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the span of the text in which each token ends, whatever the tokenizer.

    Args:
        n_bytes: Bytes of each token of the text, (n,).
    """
    ends = np.cumsum(n_bytes)
    length = max(_SMALLEST_SPAN, math.ceil(int(ends[-1]) / MOST_SPANS))
    return np.maximum(ends - 1, 0) // length


def student_t(confidence: float, freedom: int) -> float:
    """Return the two-sided quantile of Student's t (Cornish-Fisher; Abramowitz, Stegun 26.7.5).

    Args:
        confidence: Such as 0.95.
        freedom: Degrees of freedom; below 3 the series is too short, and the quantile not a number.
    """
    if freedom < 3:
        return math.nan
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return math.fsum(term / float(freedom) ** power for power, term in enumerate(terms))
