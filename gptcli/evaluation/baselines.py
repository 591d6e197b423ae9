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

from gptcli.data.overlap import compare, token_pieces
from gptcli.evaluation.ngram import KneserNey
from gptcli.evaluation.score import TokenArray, TokenSequence
from gptcli.tokenizers import Tokenizer

# Of the training text, its end is used: the compressors then forget none of it, and everything here
# together takes about 2 GB of memory.
MOST_TOKENS = 12_000_000
SECONDS_PER_BYTE = 2e-6  # of all baselines together, on one core of a server
HAS_PPMD = importlib.util.find_spec("pyppmd") is not None
_PPMD_ORDER, _PPMD_MEMORY = 16, 1 << 30  # bytes; PPMd forgets everything when they are full


@dataclass(frozen=True)
class Baselines:
    """What was measured.

    Attributes:
        bits_per_byte: By name: gzip, xz and ppmd, the latter two also `_after_training_text`, and
            ngram; no ppmd without the library pyppmd.
        bytes: Of the validation text.
        sha256: Of the validation text.
        training_bytes: Of the training text that was used.
        lines_in_training_text: The share of the validation text's lines that occur there; empty
            lines are left out.
        spans_in_training_text: By length in tokens, the share of the validation text's spans that
            occur there.
    """

    bits_per_byte: dict[str, float]
    bytes: int
    sha256: str
    training_bytes: int
    lines_in_training_text: float
    spans_in_training_text: dict[int, float]


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
