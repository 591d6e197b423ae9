"""The tokenizer of a preparation, and the text that a vocabulary is learned from."""

import itertools
from collections.abc import Iterable, Iterator
from operator import itemgetter

from gptcli.data.sources import PreparePlan
from gptcli.data.units import documents
from gptcli.tokenizers import Tokenizer, make_tokenizer, with_chat_tokens
from gptcli.tokenizers.chat import ROLES

_VOCABULARY_CHARS = 200_000_000  # enough for any vocabulary; more only takes longer


def tokenizer_of(plan: PreparePlan) -> Tokenizer:
    """Make the tokenizer of a plan; one of conversations can spell their turns."""
    tokenizer = make_tokenizer(plan.tokenizer, lambda: _sample(plan))
    return with_chat_tokens(tokenizer) if plan.data.format else tokenizer


def _sample(plan: PreparePlan) -> Iterator[str]:
    """Yield the text to learn an alphabet or a vocabulary from.

    An alphabet takes all of it, since any character may be the first of its kind; a vocabulary
    takes the start, without what is held out: validation text stays unseen.
    """
    is_alphabet, n_chars = plan.tokenizer.name == "char", 0
    if plan.data.format:
        yield "\n".join([*ROLES, ""])
    for unit in plan.source.units:
        key = itemgetter(0) if unit.held_out != "end" else lambda piece: 0
        for index, pieces in itertools.groupby(documents(unit, plan.data), key=key):
            document: Iterable[str] = (piece for _, piece, _ in pieces)
            if not is_alphabet:
                if unit.split_of(index, plan.seed, plan.val_fraction) == "val":
                    continue
                if unit.held_out in ("tail", "end") and plan.val_fraction:
                    document = _head(document, plan.val_fraction)
            for piece in document:
                n_chars += len(piece)
                if n_chars > _VOCABULARY_CHARS and not is_alphabet:
                    return
                yield piece


def _head(pieces: Iterable[str], val_fraction: float) -> Iterator[str]:
    """Yield a document without its tail, or the start of one that is too long to hold."""
    held: list[str] = []
    n_chars = 0
    for piece in pieces:
        held.append(piece)
        n_chars += len(piece)
        if n_chars > _VOCABULARY_CHARS:
            break
    # The tail is counted in tokens, which are not yet known: a little more is left out.
    n_chars = int(n_chars * (1 - min(1.0, 1.25 * val_fraction)))
    for piece in held:
        yield piece[:n_chars]
        n_chars = max(0, n_chars - len(piece))
