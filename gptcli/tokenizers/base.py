"""What every tokenizer offers, and the decoder that turns a stream of ids into text.

Knows nothing of files, shards or models.
"""

import codecs
import contextlib
import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from gptcli.errors import DataError

Ids = npt.NDArray[np.uint32]

# A place where every GPT-2-like split begins anew, whatever follows: before a space or newline
# that stands between a non-space and a letter. Text cut only there has the tokens of the whole.
SAFE_CUT = re.compile(r"(?<=\S)[ \n](?=[^\W\d_])")
# Letters, digits, marks and white space of several kinds: what a sound tokenizer gives back.
_PROBE = "The cat's 12,345 naïve DOGS\r\n\n\t  don't _sit_ on 日本 😀 (e.g. x=1).\n "


class UnknownCharacters(DataError):
    """A text holds characters that the vocabulary has no token for."""


@contextlib.contextmanager
def panics_named(what: str, *, quiet: bool = False) -> Iterator[None]:
    """Turn a panic of a Rust library into an error of ours.

    Args:
        what: Names the tokenizer.
        quiet: Also drop what is written to the file of stderr meanwhile, which is the library's
            backtrace. It is the whole process's: for a time in which no thread draws there.

    Raises:
        DataError: The library panicked: the vocabulary is not sound.
    """
    try:
        with _without_stderr() if quiet else contextlib.nullcontext():
            yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # each library has its own, no Exception
            raise
        raise DataError(f"the '{what}' tokenizer fails: {error}") from error


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    try:
        kept = os.dup(2)
    except OSError:  # closed already
        yield
        return
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class Tokenizer(ABC):
    """Text to ids and back, by a fixed vocabulary with an end-of-text id."""

    name: str
    """The name in the configuration."""
    vocab_size: int
    """Ids there are, end-of-text included."""
    eot: int
    """The end-of-text id, which stands before every document."""
    bytes_per_token: float = 4.4
    """Bytes of text for each token, before any was read: GPT-2's on OpenWebText."""
    safe_cut: re.Pattern[str] = SAFE_CUT
    """Matches where a text can be cut without changing its tokens."""
    is_foreign: bool = False
    """Whether another program made it: it may change a text, and its library may panic."""

    def encode(self, text: str) -> Ids:
        """Return the ids of `text` (n,); text that spells a special token is ordinary text.

        Raises:
            UnknownCharacters: The vocabulary has no token for part of the text.
            DataError: The library below fails on it: the vocabulary is not sound.
        """
        try:
            with panics_named(self.name, quiet=self.is_foreign):
                return self._encode(text)
        except UnicodeEncodeError as error:  # a command line whose bytes are not UTF-8
            code = f"U+{ord(text[error.start]):04X}"
            raise UnknownCharacters(
                f"character {error.start} is {code}, an unpaired surrogate (invalid Unicode)"
            ) from None

    def returns(self, text: str = _PROBE) -> bool:
        """Tell whether the ids of `text` are decoded to it again.

        Raises:
            DataError: The library below fails on it: the vocabulary is not sound.
        """
        with panics_named(self.name, quiet=True):
            return self.decode(self.encode(text).tolist()) == text

    @abstractmethod
    def _encode(self, text: str) -> Ids:
        """Return the ids of `text` (n,); may leave a lone surrogate's UnicodeEncodeError."""

    @abstractmethod
    def token_bytes(self, token: int) -> bytes:
        """Return the bytes a token stands for; end-of-text stands for none."""

    @abstractmethod
    def definition(self) -> dict[str, Any]:
        """Return all that is needed to make this tokenizer again, in JSON's types."""

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """Return the bytes of `tokens`, which may end inside a character."""
        return b"".join(self.token_bytes(token) for token in tokens)

    def decode(self, tokens: Iterable[int]) -> str:
        """Return the text of `tokens`; bytes that are no characters become U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", "replace")

    @property
    def start(self) -> tuple[int, ...]:
        """The ids that stand before a prompt."""
        return ()

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids that end a text."""
        return (self.eot,)

    @property
    def fingerprint(self) -> str:
        """A sha256 over the definition: equal exactly if the ids mean the same."""
        canonical = json.dumps(self.definition(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()

    def token_lengths(self) -> npt.NDArray[np.int64]:
        """Return the bytes of every token, (vocab_size,)."""
        lengths = [len(self.token_bytes(token)) for token in range(self.vocab_size)]
        return np.array(lengths, dtype=np.int64)


class Alphabet:
    """Collects the characters of a text that comes in pieces."""

    def __init__(self) -> None:
        self._seen = np.zeros(0x110000, dtype=bool)

    def add(self, text: str) -> None:
        """Note every character of `text`."""
        self._seen[np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)] = True

    def __str__(self) -> str:
        """The characters seen, in the order of their code points."""
        return "".join(map(chr, np.flatnonzero(self._seen)))


class TextDecoder:
    """Turns ids into text one by one, holding back the bytes of an unfinished character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Return the text that `token` completes, perhaps none."""
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def finish(self) -> str:
        """Return what is left, U+FFFD for the bytes of an unfinished character."""
        return self._utf8.decode(b"", final=True)
