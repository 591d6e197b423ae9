"""The text that an alphabet or a vocabulary is learned from.

Knows no tokenizer: it yields text, and what learns from it is elsewhere.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter

from gptcli.config.schema import DataConfig
from gptcli.data.units import Unit, documents

_VOCABULARY_CHARS = 200_000_000  # enough for any vocabulary; more only takes longer


def alphabet_text(units: Sequence[Unit], data: DataConfig) -> Iterator[str]:
    """Yield all of the text, since any of its characters may be the first of its kind."""
    for unit in units:
        for _, piece in documents(unit, data):
            yield piece


def vocabulary_text(
    units: Sequence[Unit], data: DataConfig, seed: int, val_fraction: float
) -> Iterator[str]:
    """Yield the start of the text, without what is held out: validation text stays unseen."""
    n_chars = 0
    for unit in units:
        key = itemgetter(0) if unit.held_out != "end" else lambda piece: 0
        for index, pieces in itertools.groupby(documents(unit, data), key=key):
            if unit.split_of(index, seed, val_fraction) == "val":
                continue
            document: Iterator[str] = (piece for _, piece in pieces)
            if unit.held_out in ("tail", "end") and val_fraction:
                document = _head(document, val_fraction)
            for piece in document:
                n_chars += len(piece)
                if n_chars > _VOCABULARY_CHARS:
                    return
                yield piece


def _head(pieces: Iterable[str], val_fraction: float) -> Iterator[str]:
    """Yield a document without its tail, or the start of one that is too long to keep whole."""
    kept: list[str] = []
    n_chars = 0
    for piece in pieces:
        kept.append(piece)
        n_chars += len(piece)
        if n_chars > _VOCABULARY_CHARS:
            break
    # The tail is counted in tokens, of which these are not yet known: a little more is left out.
    n_chars = int(n_chars * (1 - min(1.0, 1.25 * val_fraction)))
    for piece in kept:
        yield piece[:n_chars]
        n_chars = max(0, n_chars - len(piece))
