"""What others need for the text that a model is scored on: compressors, and an n-gram model.

All of them learn from the text while they read it, except the n-gram model, which knows only the
training text; `after_training_text` means that a compressor has read that text before.
"""

import hashlib
import importlib.util
import lzma
import math
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from gptcli.data.overlap import compare, token_pieces
from gptcli.evaluation.score import TokenArray, TokenSequence
from gptcli.tokenizers import Tokenizer, Tokens

# Of the training text, its end is used: the compressors then forget none of it, and everything here
# together takes about 2 GB of memory.
MOST_TOKENS = 12_000_000
SECONDS_PER_BYTE = 2e-6  # of all baselines together, on one core of a server
HAS_PPMD = importlib.util.find_spec("pyppmd") is not None
_PPMD_ORDER, _PPMD_MEMORY = 16, 1 << 30  # bytes; PPMd forgets everything when they are full
ORDER = 5  # of the n-gram model
_FALLBACK = (0.5, 1.0, 1.5)  # discounts where too few grams occur once, twice, or more often

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Baselines:
    """What was measured."""

    # by name: gzip, xz and ppmd, the latter two also `_after_training_text`, and ngram; no ppmd
    # without the library pyppmd
    bits_per_byte: dict[str, float]
    bytes: int  # of the validation text
    sha256: str  # of the validation text
    training_bytes: int  # of the training text that was used
    lines_in_training_text: float  # the share of the validation text's, empty lines left out
    spans_in_training_text: dict[int, float]  # by length in tokens, the share of its spans


def measure(
    train: TokenSequence,
    val: TokenSequence,
    tokenizer: Tokenizer,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Baselines:
    """Measure all baselines on the tokens of a data folder's splits."""
    n_read = min(len(train), MOST_TOKENS)
    known, tokens = train.read(len(train) - n_read, n_read), val.read(0, len(val))
    before, text = (tokenizer.decode_bytes(ids.tolist()) for ids in (known, tokens))

    def ngram() -> float:
        nats = KneserNey(known, tokenizer.vocab_size).nats(tokens).sum()
        # As for a model, the first token is context only.
        scored = len(text) - len(tokenizer.token_bytes(int(tokens[0])))
        return float(nats) / math.log(2) / 8 * len(text) / max(1, scored)

    jobs: dict[str, Callable[[], float]] = {
        "gzip": lambda: len(zlib.compress(text, 9, wbits=31)),
        "xz": lambda: _xz(text),
        "xz_after_training_text": lambda: _xz(before + text) - _xz(before),
        "ngram": ngram,
    }
    if HAS_PPMD:
        jobs["ppmd"] = lambda: _ppmd(text)
        jobs["ppmd_after_training_text"] = lambda: _ppmd(before, text) - _ppmd(before)
    sizes: dict[str, float] = {}
    with ThreadPoolExecutor(2) as pool:  # compressors run outside the interpreter's lock
        slowest_first = sorted(jobs, key=lambda name: "after" not in name)
        for name, size in zip(
            slowest_first, pool.map(lambda n: jobs[n](), slowest_first), strict=True
        ):
            sizes[name] = size
            on_progress(len(sizes), len(jobs))
    pieces = (token_pieces(TokenArray(ids), tokenizer) for ids in (known, tokens))
    shared = compare(*pieces, unit="token", show=lambda ids: tokenizer.decode(ids.tolist()))
    return Baselines(
        {name: 8 * sizes[name] / max(1, len(text)) for name in jobs},
        len(text),
        hashlib.sha256(text).hexdigest(),
        len(before),
        shared.lines.share,
        {n: each.share for n, each in shared.spans.items()},
    )


def _xz(text: bytes) -> int:
    return len(lzma.compress(text, preset=lzma.PRESET_EXTREME | 9))


def _ppmd(*texts: bytes) -> int:
    import pyppmd

    encoder = pyppmd.Ppmd7Encoder(_PPMD_ORDER, _PPMD_MEMORY)
    return sum(len(encoder.encode(text)) for text in texts) + len(encoder.flush())


class KneserNey:
    """An n-gram model of the tokens (n,) it is made from; it takes about 150 bytes for each.

    Interpolated Kneser-Ney smoothing with three discounts for each order (Chen and Goodman 1999). A
    gram's id is its place among the sorted pairs (id of all but its last token, last token), so
    each order is a few arrays.
    """

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
