"""A `tokenizer.json` of Hugging Face, encoded by the `tokenizers` library itself."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from gptcli.errors import DataError
from gptcli.tokenizers.base import ChatTokens, Ids, Tokenizer, UnknownCharacters, rust_panics
from gptcli.tokenizers.bpe import CAREFUL_CUT, byte_level_alphabet
from gptcli.tokenizers.chat import END_OF_TURN, START_OF_TURN


class ForeignTokenizer(Tokenizer):
    """The vocabulary of another program's model; `content` is its `tokenizer.json`."""

    name = "tokenizer.json"
    safe_cut = CAREFUL_CUT
    is_foreign = True

    def __init__(self, content: str, ends: Sequence[int]) -> None:
        """Read the content of a `tokenizer.json`; the first of `ends` is end-of-text.

        Raises:
            DataError: The library does not take it, or its tokens are not bytes of the text.
        """
        with rust_panics(self.name, quiet=True):
            self._read(content)
        self.content, self._ends = content, tuple(ends)
        self.eot = ends[0] if ends else self.vocab_size

    def _read(self, content: str) -> None:
        import tokenizers

        try:
            self._backend = tokenizers.Tokenizer.from_str(content)
            self._backend.encode_special_tokens = True  # text that spells one is text everywhere
            self._backend.no_truncation()
            self._backend.no_padding()
            if getattr(self._backend.model, "dropout", None):
                self._backend.model.dropout = None  # of training: ids would be random
            self.start = tuple(self._backend.encode("").ids)
        except Exception as error:  # the library raises nothing more special
            raise DataError(f"the tokenizers library cannot read it ({error})") from error
        vocabulary: dict[str, int] = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        added = self._backend.get_added_tokens_decoder()
        kind = type(self._backend.decoder).__name__
        if kind not in ("ByteLevel", "Fuse"):  # of others, a token's text depends on what is before
            raise DataError(f"its decoder is {kind}, and only ByteLevel and Fuse are supported")
        byte_of = byte_level_alphabet() if kind == "ByteLevel" else {}
        self._bytes = {id: _bytes_of(token, byte_of) for token, id in vocabulary.items()}
        for id, token in added.items():
            self._bytes[id] = b"" if token.special else token.content.encode()
        special = {token.content: id for id, token in added.items() if token.special}
        if START_OF_TURN in special and END_OF_TURN in special:
            self.chat = ChatTokens(special[START_OF_TURN], special[END_OF_TURN])

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids that end a text, or an answer."""
        return tuple(dict.fromkeys((*self._ends, *reversed(self.chat or ()))))

    def _encode(self, text: str) -> Ids:
        text.encode()  # a lone surrogate fails here with its own error
        try:
            ids = self._backend.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises nothing more special
            raise UnknownCharacters(f"the vocabulary lacks part of it ({error})") from error
        return np.array(ids, dtype=np.uint32)

    def _definition(self) -> dict[str, Any]:
        """Return a sum of the file: such a tokenizer stays with the model it came with."""
        return {"name": self.name, "sha256": hashlib.sha256(self.content.encode()).hexdigest()}


def _bytes_of(token: str, byte_of: dict[str, int]) -> bytes:
    """Return the bytes that a token spells in `byte_of`, else those of its characters."""
    try:
        return bytes(byte_of[char] for char in token)
    except KeyError:
        return token.encode()
