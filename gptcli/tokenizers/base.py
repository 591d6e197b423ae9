"""What every tokenizer offers, and the two that need no merges.

Knows nothing of files, shards or models.
"""

import contextlib
import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from gptcli.errors import DataError

Ids = npt.NDArray[np.uint32]
Dtype = Literal["uint16", "uint32"]
Tokens = npt.NDArray[np.unsignedinteger]  # ids in the type of a shard

# A place where every GPT-2-like split starts afresh, whatever follows: before a space or newline
# that is between a non-space and a letter. Text cut only there has the tokens of the whole.
SAFE_CUT = re.compile(r"(?<=\S)[ \n](?=[^\W\d_])")
# Letters, digits, marks and white space of several kinds: what a sound tokenizer gives back.
_PROBE = "The cat's 12,345 naïve DOGS\r\n\n\t  don't _sit_ on 日本 😀 (e.g. x=1).\n "


def dtype_for(vocab_size: int) -> Dtype:
    """Return the smallest token type that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


class UnknownCharacters(DataError):
    """A text holds characters that the vocabulary has no token for."""


@contextlib.contextmanager
def rust_panics(name: str, *, quiet: bool = False) -> Iterator[None]:
    """Turn a panic of a Rust library into a DataError: the vocabulary of `name` is not sound.

    `quiet` also drops what is written to stderr meanwhile, which is the library's backtrace. It is
    the whole process's stderr: only for a time in which no thread draws there.
    """
    try:
        with _without_stderr() if quiet else contextlib.nullcontext():
            yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # each library has its own, no Exception
            raise
        raise DataError(f"the '{name}' tokenizer fails: {error}") from error


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    try:
        saved = os.dup(2)
    except OSError:  # closed already
        yield
        return
    try:
        with open(os.devnull, "wb") as devnull:
            os.dup2(devnull.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


class ChatTokens(NamedTuple):
    """The ids around a turn of a conversation, which no text spells."""

    start: int
    end: int


class Tokenizer(ABC):
    """Text to ids and back, by a fixed vocabulary with an end-of-text id."""

    name: str  # in the configuration
    vocab_size: int  # with end-of-text
    eot: int  # the end-of-text id, which comes before every document
    bytes_per_token: float = 4.4  # of text, before any was read: GPT-2's on OpenWebText
    safe_cut: re.Pattern[str] = SAFE_CUT  # matches where a cut changes no token
    start: tuple[int, ...] = ()  # the ids before a prompt, such as Llama's begin-of-text
    chat: ChatTokens | None = None  # the last two ids but in a foreign one; None: it knows no turns
    is_foreign: bool = False  # of another program: may change a text, and its library may panic
    _bytes: Mapping[int, bytes]  # of the tokens that stand for text

    def encode(self, text: str) -> Ids:
        """Return the ids of `text` (n,); text that spells a special token is ordinary text.

        Raises:
            UnknownCharacters: The vocabulary has no token for part of the text.
            DataError: The underlying library fails on it: the vocabulary is not sound.
        """
        try:
            with rust_panics(self.name, quiet=self.is_foreign):
                return self._encode(text)
        except UnicodeEncodeError as error:  # a command line whose bytes are not UTF-8
            code = f"U+{ord(text[error.start]):04X}"
            raise UnknownCharacters(
                f"character {error.start} is {code}, an unpaired surrogate (invalid Unicode)"
            ) from None

    def returns(self, text: str = _PROBE) -> bool:
        """Tell whether decoding the ids of `text` gives it back."""
        with rust_panics(self.name, quiet=True):
            return self.decode(self.encode(text).tolist()) == text

    @abstractmethod
    def _encode(self, text: str) -> Ids:
        """Return the ids of `text` (n,); may leave a lone surrogate's UnicodeEncodeError."""

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes a token stands for; special and unused ids stand for none."""
        return self._bytes.get(token, b"")

    @abstractmethod
    def _definition(self) -> dict[str, Any]:
        """Return all that is needed to make this tokenizer again, but for its chat tokens."""

    def definition(self) -> dict[str, Any]:
        """Return all that is needed to make this tokenizer again, in JSON's types."""
        chat = {"chat": list(self.chat)} if self.chat else {}
        return self._definition() | chat

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """Return the bytes of `tokens`, which may end inside a character."""
        return b"".join(self.token_bytes(token) for token in tokens)

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of `tokens`; bytes that are no characters become U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", "replace")

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids that end a text, or an answer."""
        return (self.eot,) if self.chat is None else (self.eot, self.chat.end, self.chat.start)

    @property
    def fingerprint(self) -> str:
        """A sha256 over the definition: equal exactly if the ids mean the same."""
        canonical = json.dumps(self.definition(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def token_lengths(self) -> npt.NDArray[np.int64]:
        """Return the bytes of every token, (vocab_size,)."""
        lengths = [len(self.token_bytes(token)) for token in range(self.vocab_size)]
        return np.array(lengths, dtype=np.int64)


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
        self._bytes = {token: char.encode("utf-8") for token, char in enumerate(alphabet)}
        points = np.array([ord(char) for char in alphabet], dtype=np.int64)
        self._ids = np.full(int(points.max(initial=0)) + 1, self.eot, dtype=np.uint32)
        self._ids[points] = np.arange(len(points))

    @classmethod
    def of(cls, texts: Iterable[str]) -> Self:
        """Return a vocabulary of the characters of a text that comes in pieces."""
        seen = np.zeros(0x110000, dtype=bool)
        for text in texts:
            seen[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)] = True
        return cls("".join(map(chr, np.flatnonzero(seen))))

    def _encode(self, text: str) -> Ids:
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

    def _definition(self) -> dict[str, Any]:
        return {"name": self.name, "alphabet": self._alphabet}


class ByteTokenizer(Tokenizer):
    """One id for each byte of UTF-8; nothing is unknown to it."""

    name = "bytes"
    bytes_per_token = 1.0
    eot = 256
    vocab_size = 257
    _bytes = MappingProxyType({byte: bytes([byte]) for byte in range(256)})

    def _encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint32)

    def _definition(self) -> dict[str, Any]:
        return {"name": self.name}
