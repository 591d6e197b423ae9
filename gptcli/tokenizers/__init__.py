"""Text to token ids and back; each tokenizer is small enough to travel in a checkpoint."""

from gptcli.tokenizers.base import (
    SAFE_CUT,
    Alphabet,
    Ids,
    TextDecoder,
    Tokenizer,
    UnknownCharacters,
)
from gptcli.tokenizers.factory import (
    dump_tokenizer,
    load_tokenizer,
    make_tokenizer,
    tokenizer_from,
)

__all__ = [
    "SAFE_CUT",
    "Alphabet",
    "Ids",
    "TextDecoder",
    "Tokenizer",
    "UnknownCharacters",
    "dump_tokenizer",
    "load_tokenizer",
    "make_tokenizer",
    "tokenizer_from",
]
