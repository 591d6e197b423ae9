"""What is in a data folder: lengths of documents, tokens, characters, duplicates, and samples."""

import hashlib
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gptcli.config.schema import Split
from gptcli.data.conversations import ConversationReader
from gptcli.data.overlap import token_pieces
from gptcli.data.shards import SPLITS, Manifest, TokenReader, read_tokenizer
from gptcli.formatting import printable
from gptcli.seeding import derive_seed
from gptcli.tokenizers import Tokenizer

MOST_TOKENS = 100_000_000
Ints = npt.NDArray[np.int64]
_FREQUENT, _SAMPLES, _SAMPLE_TOKENS = 25, 5, 300
_KINDS = {"M": "combining marks", "N": "digits", "P": "punctuation", "S": "symbols"}


@dataclass(frozen=True)
class Document:
    """A document: its split, first token, length in tokens, and the beginning of its text."""

    split: Split
    start: int
    tokens: int
    text: str


@dataclass(frozen=True)
class Contents:
    """What was counted in the tokens that were read, of both splits."""

    tokens_read: int  # the beginning of each split, or all
    documents: int  # that have tokens; a conversation is one too
    empty_documents: int  # that have none, and count nowhere else
    tokens_per_byte: float  # of text
    unused_ids: int  # of the vocabulary, which do not occur
    mean_length: float
    median_length: float
    longest: int
    lengths: list[tuple[int, int]]  # fewest tokens, documents of these to less than twice as many
    frequent: list[tuple[int, str, int]]  # (id, text, count) of the most frequent tokens
    characters: dict[str, int]  # counts of letters by script, and of others by kind
    copies: int  # documents whose tokens equal those of an earlier one, by a hash of 64 bits
    copies_in_val: int  # documents for validation that the training split has, too
    most_copies: int
    most_copied: Document | None  # the one that occurs most often, `most_copies` times
    samples: list[Document]  # drawn by the folder's seed


class _SplitReader:
    """Reads the beginning of a split: its documents in parallel arrays, and counts."""

    def __init__(
        self, folder: Path, manifest: Manifest, split: Split, tokenizer: Tokenizer
    ) -> None:
        self._place = folder, manifest, split
        self._tokenizer, self._digest = tokenizer, hashlib.blake2b(digest_size=8)
        self._starts, self._lengths, self._hashes = array("q"), array("q"), array("Q")
        self.tokens = np.zeros(tokenizer.vocab_size, np.int64)
        self.characters = np.zeros(0x110000, np.int64)

    def read(self, most: int, on_progress: Callable[[int], None]) -> None:
        begins = None
        if self._place[1].is_chat:
            with ConversationReader(*self._place) as chats:
                begins = np.cumsum(chats.lengths) - chats.lengths
        start = place = 0
        is_open = False
        with TokenReader(*self._place) as tokens:
            for text, units in token_pieces(tokens, self._tokenizer, most):
                self.tokens += np.bincount(units[units >= 0], minlength=len(self.tokens))
                points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
                self.characters += np.bincount(points, minlength=len(self.characters))
                borders = np.flatnonzero(units < 0)
                if begins is not None:
                    borders = begins[(begins >= place) & (begins < place + len(units))] - place
                for number, part in enumerate(np.split(units, borders)):
                    if number:
                        self._end(start, place, is_open)
                        start, is_open = place + (begins is None), True
                    self._digest.update(part[part >= 0].tobytes())
                    is_open, place = is_open or len(part) > 0, place + len(part)
                on_progress(len(units))
            self._end(start, place, is_open and place == len(tokens))
        self.lengths = np.array(self._lengths, np.int64)  # tokens of each document, (n,)
        self.hashes = np.array(self._hashes, np.uint64)  # of each document, (n,)

    def _end(self, start: int, end: int, is_whole: bool) -> None:
        if is_whole:
            self._starts.append(start)
            self._lengths.append(end - start)
            self._hashes.append(int.from_bytes(self._digest.digest(), "little"))
        self._digest = hashlib.blake2b(digest_size=8)

    def document(self, index: int) -> Document:
        """Return a document and the beginning of its text."""
        start, length = self._starts[index], self._lengths[index]
        with TokenReader(*self._place) as tokens:
            ids = tokens.read(start, min(length, _SAMPLE_TOKENS)).tolist()
        text = printable(self._tokenizer.decode(ids), "\ufffd") + "..." * (length > len(ids))
        return Document(self._place[2], start, length, text)


def measure(
    folder: Path,
    manifest: Manifest,
    most_tokens: int = MOST_TOKENS,
    on_progress: Callable[[int], None] = lambda n_tokens: None,
) -> Contents:
    """Read the first `most_tokens` of each split; a DataError if the folder is damaged.

    `on_progress` gets the number newly read.
    """
    tokenizer = read_tokenizer(folder, manifest)
    splits = [_SplitReader(folder, manifest, split, tokenizer) for split in SPLITS]
    for each in splits:
        each.read(most_tokens, on_progress)
    counts = np.sum([each.tokens for each in splits], axis=0)
    # (split, document) of those that are not empty
    where = np.array(
        [(i, j) for i, each in enumerate(splits) for j in np.flatnonzero(each.lengths)], np.int64
    ).reshape(-1, 2)
    lengths, hashes = (
        np.concatenate([getattr(each, name)[each.lengths > 0] for each in splits])
        for name in ("lengths", "hashes")
    )

    def document(number: int) -> Document:
        split, index = map(int, where[number])
        return splits[split].document(index)

    n = len(lengths)
    _, firsts, copies = np.unique(hashes, return_index=True, return_counts=True)
    most, is_val = int(copies.max(initial=0)), where[:, 0] == 1
    drawn = {derive_seed("sample", manifest.recipe.seed, i) % n for i in range(_SAMPLES) if n}
    powers = np.bincount(np.frexp(lengths)[1] - 1) if n else np.empty(0, np.int64)
    n_bytes = int(counts @ tokenizer.token_lengths())
    return Contents(
        tokens_read=sum(min(most_tokens, getattr(manifest.tokens, split)) for split in SPLITS),
        documents=n,
        empty_documents=sum(int((each.lengths == 0).sum()) for each in splits),
        tokens_per_byte=int(counts.sum()) / max(1, n_bytes),
        unused_ids=int((counts == 0).sum()) - len(tokenizer.ends),
        mean_length=float(lengths.mean()) if n else 0.0,
        median_length=float(np.median(lengths)) if n else 0.0,
        longest=int(lengths.max(initial=0)),
        lengths=[(1 << power, int(count)) for power, count in enumerate(powers)
                 if powers[: power + 1].any()],
        frequent=[(int(i), tokenizer.decode([int(i)]), int(counts[i]))
                  for i in np.argsort(-counts, stable=True)[:_FREQUENT] if counts[i]],
        characters=_by_kind(np.sum([each.characters for each in splits], axis=0)),
        copies=n - len(copies),
        copies_in_val=int(np.isin(hashes[is_val], hashes[~is_val]).sum()),
        most_copies=most,
        most_copied=document(int(firsts[copies.argmax()])) if most > 1 else None,
        samples=[document(number) for number in sorted(drawn)],
    )  # fmt: skip


def _by_kind(counts: Ints) -> dict[str, int]:
    """Add up the counts of code points by script or kind, the most frequent first."""
    found = Counter[str]()
    for point in np.flatnonzero(counts):
        char = chr(point)
        category = unicodedata.category(char)
        if char.isspace():
            kind = "white space"
        elif category[0] == "L":  # a letter's name begins with its script
            plain = unicodedata.normalize("NFKC", char)[-1]  # MICRO SIGN is a Greek mu
            script = unicodedata.name(plain, "OTHER").split()[0]
            kind = f"{script if script == 'CJK' else script.capitalize()} letters"
        else:
            kind = _KINDS.get(category[0], "control characters")
        if category != "Cs":  # the borders of documents, and bytes that are no characters
            found[kind] += int(counts[point])
    return dict(found.most_common())
