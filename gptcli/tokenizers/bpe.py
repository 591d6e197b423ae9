"""Byte-pair vocabularies, encoded by tiktoken: GPT-2's, any of tiktoken's, and trained ones."""

import base64
import hashlib
import itertools
import re
from binascii import a2b_base64
from collections.abc import Iterable
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tiktoken

from gptcli.errors import ConfigError, DataError
from gptcli.tokenizers.base import SAFE_CUT, Ids, Tokenizer

if TYPE_CHECKING:
    import tokenizers as hf

END_OF_TEXT = "<|endoftext|>"
GPT2_FILE = Path(__file__).with_name("gpt2.tiktoken")  # in tiktoken's format
GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
# GPT-2's split into words (Radford et al. 2019), in an equivalent form. All that needs no
# look-ahead is in one group, which tiktoken's regex engine then runs as one automaton: twice
# as fast as tiktoken's own form, where each alternative is tried by itself.
GPT2_PATTERN = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s++$|\s+(?!\S)|\s"
# The same for the `tokenizers` library, whose `$` would match at every newline.
_GPT2_PATTERN_PLAIN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s"
# Other patterns take newlines together with what is before them (cl100k: `...]+[\r\n]*`).
CAREFUL_CUT = re.compile(r"(?<=[^\W\d_]) (?=[^\W\d_])")
# The look-ahead needs memory for each character of white space; from a million on tiktoken ends
# the process. Before the last one of a run that a word follows, GPT-2's split starts afresh anyway.
_LONG_SPACE = 250_000
_SPACE = r"[^\S\x1c-\x1f]"  # what Unicode calls white space; Python's \s is wider
_LAST_OF_SPACE = re.compile(
    rf"(?<!{_SPACE}){_SPACE}{{{_LONG_SPACE - 1},}}(?={_SPACE}[\S\x1c-\x1f])"
)

_MAX_NAME_CHARS = 100
_MAX_IDS = 1 << 21  # the library makes room for all that are asked for before it counts

Ranks = dict[bytes, int]


class BpeTokenizer(Tokenizer):
    """A byte-pair vocabulary in tiktoken's form.

    `pattern` splits text into words; `ranks` has tokens and their ids, the lower of which are
    merged first; `specials` has special tokens and their ids.
    """

    def __init__(self, name: str, pattern: str, ranks: Ranks, specials: dict[str, int]) -> None:
        self.name = name
        self.pattern, self.ranks, self.specials = pattern, ranks, specials
        self.eot = specials[END_OF_TEXT]
        self.bytes_per_token = 3.5 if name == "bpe" else 4.4  # a small one of this text, or GPT-2's
        self.vocab_size = max(max(ranks.values(), default=0), *specials.values()) + 1
        self.safe_cut = SAFE_CUT if pattern == GPT2_PATTERN else CAREFUL_CUT

    @cached_property
    def encoding(self) -> tiktoken.Encoding:
        """The tiktoken encoding, built when first needed (GPT-2's takes a tenth of a second)."""
        return tiktoken.Encoding(
            self.name,
            pat_str=self.pattern,
            mergeable_ranks=self.ranks,
            special_tokens=self.specials,
        )

    @cached_property
    def _bytes(self) -> dict[int, bytes]:  # type: ignore[override] # made when first needed
        return {rank: token for token, rank in self.ranks.items()}

    def _encode(self, text: str) -> Ids:
        parts = [self.encoding.encode_to_numpy(part, disallowed_special=()) for part in _tame(text)]
        ids: Ids = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return ids

    def _definition(self) -> dict[str, Any]:
        """Return the name and, for all but the bundled vocabulary, pattern, ranks and specials."""
        if self.name == "gpt2":
            return {"name": "gpt2", "sha256": GPT2_SHA256}
        return {
            "name": self.name,
            "pattern": self.pattern,
            "ranks": dump_ranks(self.ranks).decode(),
            "specials": self.specials,
        }


def _tame(text: str) -> list[str]:
    """Cut `text` where a very long run of white space would be too much for tiktoken."""
    step = _LONG_SPACE // 2  # such a run covers one of these windows, which are quickly looked at
    if not any(text[at : at + step].isspace() for at in range(0, len(text) - step + 1, step)):
        return [text]
    cuts = [match.end() for match in _LAST_OF_SPACE.finditer(text)]
    return [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]


@cache
def gpt2() -> BpeTokenizer:
    """Return GPT-2's vocabulary from the file in this package; needs no network."""
    raw = GPT2_FILE.read_bytes()
    if hashlib.sha256(raw).hexdigest() != GPT2_SHA256:
        raise DataError(f"{GPT2_FILE}: damaged GPT-2 vocabulary", "install gptcli again")
    return BpeTokenizer("gpt2", GPT2_PATTERN, _read_ranks(raw), {END_OF_TEXT: 50256})


def from_definition(definition: dict[str, Any]) -> BpeTokenizer:
    """Make a tokenizer from its `definition()`; a KeyError, TypeError or ValueError if damaged."""
    for key in ("name", "pattern", "ranks"):
        if not isinstance(definition[key], str):
            raise TypeError(f"{key} is not text")
    if not definition["pattern"] or not isinstance(definition["specials"], dict):
        raise ValueError("there is no pattern, or no special token")
    if len(definition["name"]) > _MAX_NAME_CHARS or not definition["name"].isprintable():
        raise ValueError("the name is not one of a tokenizer")
    ranks, specials = _read_ranks(definition["ranks"].encode()), dict(definition["specials"])
    ids = [*ranks.values(), *specials.values()]
    # tiktoken ends the process on what it cannot encode, so it must not get that far.
    if not all(bytes([byte]) in ranks for byte in range(256)):
        raise ValueError("a byte has no rank")
    if len(set(ids)) != len(ids) or min(ids) < 0 or max(ids) > 2 * len(ids):
        raise ValueError("the ids are not those of a vocabulary")
    tokenizer = BpeTokenizer(definition["name"], definition["pattern"], ranks, specials)
    if not tokenizer.returns():
        raise ValueError("its pattern leaves out parts of a text")
    return tokenizer


def _read_ranks(raw: bytes) -> Ranks:
    """Read tiktoken's file format: a base64 token and its rank on each line."""
    words = raw.split()  # one pass: GPT-2's 50,000 lines are read at each start
    ranks = dict(zip(map(a2b_base64, words[::2]), map(int, words[1::2]), strict=True))
    if 2 * len(ranks) != len(words):
        raise ValueError("a token has two ranks")
    return ranks


def dump_ranks(ranks: Ranks) -> bytes:
    """Write tiktoken's file format, the ranks in their order."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"\n".join(base64.b64encode(token) + b" %d" % rank for token, rank in ordered)


def from_tiktoken(name: str) -> BpeTokenizer:
    """Return one of tiktoken's own encodings, downloaded once into its cache."""
    if name not in tiktoken.list_encoding_names():
        own = ["gpt2", "char", "bytes", "bpe"]
        known = ", ".join(dict.fromkeys([*own, *tiktoken.list_encoding_names()]))
        raise ConfigError(f"tokenizer.name: unknown tokenizer '{name}'", f"known: {known}")
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # requests' errors are OSErrors; a bad hash a ValueError
        raise DataError(
            f"the vocabulary of '{name}' is not in tiktoken's cache and cannot be downloaded:"
            f" {type(error).__name__}",
            "connect to the network once, set TIKTOKEN_CACHE_DIR, or use tokenizer.name=gpt2",
        ) from error
    specials = dict(encoding._special_tokens)
    if END_OF_TEXT not in specials:
        raise ConfigError(f"tokenizer.name: '{name}' has no {END_OF_TEXT} token")
    return BpeTokenizer(name, encoding._pat_str, encoding._mergeable_ranks, specials)


def train_bpe(texts: Iterable[str], vocab_size: int) -> BpeTokenizer:
    """Train a byte-pair vocabulary with GPT-2's split on `texts`.

    The `tokenizers` library counts and merges; tiktoken encodes, with the same ids. The texts are
    pieces cut at `SAFE_CUT` places; `vocab_size`, at least 257, is a maximum with end-of-text.
    """
    vocabulary = train_tokenizers(texts, vocab_size - 1).get_vocab()
    # tiktoken merges by rank: the 256 bytes first, then the merges in the order they were found.
    byte_of = byte_level_alphabet()
    by_rank = sorted(vocabulary, key=vocabulary.__getitem__)
    tokens = [bytes(byte_of[char] for char in token) for token in by_rank]
    merged = [token for token in tokens if len(token) > 1]
    ranks = {token: rank for rank, token in enumerate([bytes([i]) for i in range(256)] + merged)}
    return BpeTokenizer("bpe", GPT2_PATTERN, ranks, {END_OF_TEXT: len(ranks)})


def train_tokenizers(texts: Iterable[str], vocab_size: int) -> "hf.Tokenizer":
    """Train a byte-level vocabulary of at most `vocab_size` ids in the `tokenizers` library."""
    import tokenizers as hf

    trainer = hf.trainers.BpeTrainer(
        vocab_size=min(vocab_size, _MAX_IDS),
        show_progress=False,
        initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer = hf.Tokenizer(hf.models.BPE())
    tokenizer.pre_tokenizer = hf.pre_tokenizers.Sequence(
        [
            hf.pre_tokenizers.Split(hf.Regex(_GPT2_PATTERN_PLAIN), "isolated"),
            hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def byte_level_alphabet() -> dict[str, int]:
    """Return the printable characters that GPT-2 writes for bytes, as character -> byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    characters = {chr(byte): byte for byte in printable}
    return characters | {chr(256 + i): byte for i, byte in enumerate(others)}
