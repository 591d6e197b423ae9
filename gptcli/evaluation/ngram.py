"""An n-gram model of the same tokens: what counting predicts without a neural network.

Interpolated Kneser-Ney smoothing with three discounts for each order (Chen and Goodman 1999). A
gram's id is its place among the sorted pairs (id of all but its last token, last token), so each
order is a few arrays.
"""

import numpy as np
import numpy.typing as npt

from gptcli.tokenizers import Tokens

ORDER = 5
_FALLBACK = (0.5, 1.0, 1.5)  # discounts where too few grams occur once, twice, or more often

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class KneserNey:
    """A model of the tokens (n,) it is made from; it takes about 150 bytes for each."""

    def __init__(self, tokens: Tokens, vocab_size: int, order: int = ORDER) -> None:
        self._vocab_size, self._orders = vocab_size, list[_Order]()
        ids: Ints = np.zeros(len(tokens) + 1, np.int64)  # of the gram of order n - 1 at each place
        keys = counts = np.zeros(0, np.int64)
        for n in range(1, order + 1):
            ends = tokens[n - 1 :]
            longer, first, longer_ids, occurrences = np.unique(
                ids[: len(ends)] * vocab_size + ends,
                return_index=True, return_inverse=True, return_counts=True,
            )  # fmt: skip
            if n > 1:  # all orders but the last count how many tokens come before a gram
                counts = np.bincount(ids[first + 1], minlength=len(keys))
                self._orders.append(_Order(keys, counts, vocab_size))
            keys, counts, ids = longer, occurrences, longer_ids
        self._orders.append(_Order(keys, counts, vocab_size))

    def nats(self, tokens: Tokens) -> Floats:
        """Return the loss of every token but the first, (n - 1,)."""
        p: Floats = np.full(len(tokens), 1 / self._vocab_size)
        ids: Ints = np.zeros(len(tokens) + 1, np.int64)
        for n, grams in enumerate(self._orders, 1):
            ends = tokens[n - 1 :]
            contexts = ids[: len(ends)]
            ids = grams.find(np.where(contexts < 0, -1, contexts * self._vocab_size + ends))
            grams.interpolate(p[n - 1 :], contexts, ids)
        return -np.log(p[1:])


class _Order:
    """The grams of one order: their keys, sorted, and what the formula needs of each."""

    def __init__(self, keys: Ints, counts: Ints, vocab_size: int) -> None:
        discounts = np.zeros(max(4, counts.max(initial=0) + 1))
        n1, n2, n3, n4 = np.bincount(counts, minlength=5)[1:5].tolist()
        y = n1 / max(1, n1 + 2 * n2)
        for n, (fewer, more) in enumerate(((n1, n2), (n2, n3), (n3, n4)), 1):
            discount = n - (n + 1) * y * more / fewer if fewer else -1.0
            discounts[n : n + 1 if n < 3 else None] = (
                discount if n1 and 0 < discount <= n else _FALLBACK[n - 1]
            )
        contexts, taken = keys // vocab_size, discounts[counts]
        self._keys, self._kept = keys, counts - taken
        self._totals, self._taken = np.bincount(contexts, counts), np.bincount(contexts, taken)

    def find(self, keys: Ints) -> Ints:
        """Return the ids of grams; -1 for those that did not occur."""
        places = np.searchsorted(self._keys, keys)
        known = np.append(self._keys, -2)[places] == keys
        return np.where(known, places, -1)

    def interpolate(self, p: Floats, contexts: Ints, ids: Ints) -> None:
        """Turn the lower order's probabilities of last tokens into this order's, in place."""
        known = (contexts >= 0) & (contexts < len(self._totals))
        known[known] = self._totals[contexts[known]] > 0
        contexts, ids, below = contexts[known], ids[known], p[known]
        kept = np.where(ids < 0, 0.0, self._kept[ids])
        p[known] = (kept + self._taken[contexts] * below) / self._totals[contexts]
