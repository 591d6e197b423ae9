"""The two vocabularies that need no training: single characters and single bytes.

Both put end-of-text after their alphabet.
"""

from typing import Any

import numpy as np

from gptcli.tokenizers.base import Ids, Tokenizer, UnknownCharacters


class CharTokenizer(Tokenizer):
    """One id for each character of an alphabet, in code point order (as nanoGPT's)."""

    name = "char"
    bytes_per_token = 1.0

    def __init__(self, alphabet: str) -> None:
        if not isinstance(alphabet, str) or list(alphabet) != sorted(set(alphabet)):
            raise ValueError("the alphabet is not in the order of its code points")
        self._alphabet = alphabet
        self.eot = len(alphabet)
        self.vocab_size = len(alphabet) + 1
        self._bytes = [char.encode("utf-8") for char in alphabet] + [b""]
        points = np.array([ord(char) for char in alphabet], dtype=np.int64)
        self._ids = np.full(int(points.max(initial=0)) + 1, self.eot, dtype=np.uint32)
        self._ids[points] = np.arange(len(points))

    def _encode(self, text: str) -> Ids:
        """Return one id for each character, (n,)."""
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        last = np.uint32(len(self._ids) - 1)
        ids = self._ids[np.minimum(points, last)]
        unknown = (ids == self.eot) | (points > last)
        if unknown.any():
            chars = sorted({chr(point) for point in points[unknown]})
            shown = " ".join(f"{char!r} (U+{ord(char):04X})" for char in chars[:5])
            raise UnknownCharacters(
                f"the char vocabulary of {self.eot} characters does not have: {shown}"
                + (f" and {len(chars) - 5} more" if len(chars) > 5 else ""),
                "use only characters of the training text, or prepare with another tokenizer",
            )
        return ids

    def token_bytes(self, token: int) -> bytes:
        """Return the character's UTF-8 bytes."""
        return self._bytes[token]

    def definition(self) -> dict[str, Any]:
        """Return the alphabet."""
        return {"name": self.name, "alphabet": self._alphabet}


class ByteTokenizer(Tokenizer):
    """One id for each byte of UTF-8; nothing is unknown to it."""

    name = "bytes"
    bytes_per_token = 1.0
    eot = 256
    vocab_size = 257

    def _encode(self, text: str) -> Ids:
        """Return one id for each byte, (n,)."""
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint32)

    def token_bytes(self, token: int) -> bytes:
        """Return the byte itself."""
        return bytes([token]) if token < self.eot else b""

    def definition(self) -> dict[str, Any]:
        """Return the name, which says all."""
        return {"name": self.name}
