"""What a text shares with another: lines, spans of 13 and 50 units, the longest common span.

A unit is a token, or a word. The result is exact, without hashes: a span of 2n units is two spans
of n, and its number is the place of their two numbers among all such pairs of text B, sorted (Karp,
Miller and Rosenberg 1972). Text A is read once, in parts; memory grows with B only.
"""

import codecs
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from gptcli.config.schema import Split
from gptcli.data.archives import suffix_of
from gptcli.data.readers import ROW_SUFFIXES, files_in, read_rows, read_text
from gptcli.data.shards import TokenReader, read_manifest, read_tokenizer
from gptcli.errors import DataError
from gptcli.formatting import printable
from gptcli.tokenizers import SAFE_CUT, Tokenizer

SPANS = (13, 50)  # units
MOST_UNITS = 8_000_000  # of B, which take up to 2 GB
_PART = 1 << 20
_LONGEST_WORD = 1 << 16  # characters; a longer one may be cut
_SHOWN = 120  # units of an example
_EXAMPLES = 5
# What ends a document: 0xff, which is in no UTF-8, as `surrogateescape` decodes it.
BORDER = "\udcff"
# Characters of scripts that put no space between words, each a word here.
_ALONE = re.compile(
    f"[{BORDER}\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)

Ints = npt.NDArray[np.int64]
Piece = tuple[str, Ints]  # a part of a text, and its units; -1 where a document ends


class Tokens(Protocol):
    """Tokens that can be read anywhere."""

    def __len__(self) -> int: ...

    def read(self, start: int, count: int) -> npt.NDArray[np.unsignedinteger]:
        """Return `count` tokens from `start` on."""
        ...


@dataclass(frozen=True)
class Share:
    """How many of B's lines, spans or questions occur in A."""

    total: int
    found: int

    @property
    def share(self) -> float:
        """The part that occurs."""
        return self.found / max(1, self.total)


@dataclass(frozen=True)
class Stretch:
    """A part of B: its first unit, its length in units, and the beginning of its text."""

    start: int
    units: int
    text: str


@dataclass(frozen=True)
class Overlap:
    """What was found."""

    unit: str  # what a span is made of
    units: int  # those of B that were compared
    is_part: bool  # whether B has more than these
    lines: Share  # B's lines that A has; empty lines are left out
    spans: dict[int, Share]  # by length, in units; without those across a border of documents
    longest: Stretch  # the longest common span
    stretches: list[Stretch]  # the longest parts of B in which every span of 13 units occurs in A
    questions: Share | None = None  # with a span of 13 units in A; of a shorter one, all of it
    questions_found: tuple[int, ...] = ()  # their numbers, from 0 on


class Spans:
    """The spans of text B, and which of them occur in A."""

    def __init__(self, units: Ints, lengths: Iterable[int] = SPANS) -> None:
        """Number the spans of these lengths of units (n,); -1 is a border."""
        self.longest = (0, 0)  # the start in B, and the length, of the longest common span so far
        self._known = [_distinct(units)]
        self._ids = [_places(units, self._known[0])]  # of spans of 1, 2, 4, ... units
        self._tail: Ints = np.empty(0, np.int64)
        self._tables: dict[int, tuple[Ints, Ints, npt.NDArray[np.bool_]]] = {}
        for n in sorted({*lengths, *SPANS}):
            own = self._keys(self._ids, n)
            known = _distinct(own)
            self._tables[n] = known, _places(own, known), np.zeros(len(known), np.bool_)

    def _keys(self, ids: list[Ints], n: int) -> Ints:
        """Return a number for each span of n units, -1 for one that B does not have for sure.

        `ids` are those of a text's spans of 1, 2, 4, ... units; what is missing is added.
        """
        level = n.bit_length() - 1
        while len(ids) <= level:
            k = len(ids) - 1
            if ids is self._ids:
                pairs = _pairs(ids[k], 1 << k, len(self._known[k]))
                self._known.append(_distinct(pairs))
            else:
                self._keys(self._ids, 2 << k)
                pairs = _pairs(ids[k], 1 << k, len(self._known[k]))
            ids.append(_places(pairs, self._known[k + 1]))
        return _pairs(ids[level], n - (1 << level), len(self._known[level]))

    def feed(self, units: Ints) -> None:
        """Read the next units of A, (n,)."""
        units = np.concatenate([self._tail, units])
        ids, hits = [_places(units, self._known[0])], np.empty(0, np.bool_)
        low = self.longest[1] + 1
        for n, (known, _, found) in self._tables.items():
            at = _places(self._keys(ids, n), known)
            hits = at >= 0
            found[at[hits]] = True
            low = max(low, n) if hits.any() else low
        if self._meets(ids, low):
            while self._meets(ids, 2 * low):
                low *= 2
            high = 2 * low
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if self._meets(ids, middle) else (low, middle)
        # A common span that continues in the next part begins with spans that were found here.
        misses = np.flatnonzero(~hits)
        n_hits = len(hits) - (int(misses[-1]) + 1 if len(misses) else 0)
        kept = min(len(self._ids[0]), n_hits + SPANS[-1] - 1)
        self._tail = units[max(0, len(units) - kept) :]

    def _meets(self, ids: list[Ints], n: int) -> bool:
        """Tell whether a part of A and B have a span of n units in common, and note it."""
        if n > len(self._ids[0]) or not (ids[min(n.bit_length(), len(ids)) - 1] >= 0).any():
            return False
        keys = self._keys(ids, n)
        keys = np.sort(keys[keys >= 0])
        if not len(keys):
            return False
        at = np.flatnonzero(_places(self._keys(self._ids, n), keys) >= 0)
        if len(at):
            self.longest = int(at[0]), n
        return len(at) > 0

    def found(self, n: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Return, for each place of B, whether a span of n units begins there, and is in A."""
        _, at, found = self._tables[n]
        is_span = at >= 0
        is_found = is_span.copy()
        is_found[is_span] = found[at[is_span]]
        return is_span, is_found

    def stretches(self, most: int) -> list[tuple[int, int]]:
        """Return (start, length) of the longest parts of B whose spans all occur in A."""
        _, is_found = self.found(SPANS[0])
        edges = np.flatnonzero(np.diff(is_found, prepend=False, append=False))
        runs = sorted(zip(edges[::2], edges[1::2], strict=True), key=lambda run: run[0] - run[1])
        return [(int(start), int(end - start) + SPANS[0] - 1) for start, end in runs[:most]]


def _pairs(ids: Ints, shift: int, n_ids: int) -> Ints:
    """Return a number for each pair of ids `shift` apart, -1 where one is unknown."""
    left, right = ids[: max(0, len(ids) - shift)], ids[shift:]
    return np.where((left < 0) | (right < 0), -1, left * n_ids + right)


def _distinct(keys: Ints) -> Ints:
    """Return the keys from 0 on, sorted, each once."""
    keys = np.sort(keys[keys >= 0])
    return keys[np.flatnonzero(np.diff(keys, prepend=-1))]


def _places(keys: Ints, known: Ints) -> Ints:
    """Return the place of each key among those known, which are sorted; -1 for others."""
    found = np.full(len(keys), -1, np.int64)
    at = np.flatnonzero(keys >= 0)
    if len(known) and len(at):
        at = at[np.argsort(keys[at])]  # in order, they are found three times as fast
        keys = keys[at]
        places = np.minimum(np.searchsorted(known, keys), len(known) - 1)
        found[at] = np.where(known[places] == keys, places, -1)
    return found


class Lines:
    """The lines of text B that are not empty, and which of them occur in A."""

    def __init__(self, pieces: Iterable[str]) -> None:
        self._held, self._most = "", 0
        lines = "".join(pieces).replace(BORDER, "\n").split("\n")
        # A line that begins with a null byte is the role above a message of a conversation.
        self._lines = [line for line in lines if line.strip() and line[0] != "\0"]
        self._missing = set(self._lines)
        self._most = max(map(len, self._lines), default=0) + 1

    def feed(self, text: str) -> None:
        """Read the next part of A."""
        *lines, held = (self._held + text.replace(BORDER, "\n")).split("\n")
        self._missing.difference_update(lines)
        self._held = held[: self._most]  # a longer line is none of B's

    def share(self) -> Share:
        """Return how many there are; A has no more text."""
        self.feed("\n")
        return Share(len(self._lines), sum(line not in self._missing for line in self._lines))


def compare(
    a: Iterable[Piece],
    b: Iterable[Piece],
    *,
    unit: str,
    show: Callable[[Ints], str],
    n_questions: int = 0,
) -> Overlap:
    """Compare text B with A.

    Args:
        a: Text A, read once.
        b: Text B, of which the first `MOST_UNITS` units are read.
        unit: What a span is made of.
        show: Returns the text of units.
        n_questions: So many documents at the beginning of B are questions.
    """
    texts, parts, n_units, is_part = list[str](), list[Ints](), 0, False
    for text, units in b:
        if is_part := n_units >= MOST_UNITS and bool((units >= 0).any()):
            break
        texts.append(text)
        parts.append(units)
        n_units += len(units)
    units_b = np.concatenate([*parts, np.full(1, -1)])
    n_units = int((units_b >= 0).sum())
    ends = np.flatnonzero(units_b < 0)[:n_questions].tolist()
    asked = [(last + 1, end - last - 1) for last, end in pairwise([-1, *ends])]
    spans = Spans(units_b, {min(length, SPANS[0]) for _, length in asked} - {0})
    lines = Lines(texts)
    for text, units in a:
        lines.feed(text)
        spans.feed(units)

    def stretch(start: int, length: int) -> Stretch:
        shown = units_b[start : start + min(length, _SHOWN)]
        text = printable(show(shown[shown >= 0]), "\ufffd")
        return Stretch(start, length, text + "..." * (length > _SHOWN))

    seen = []
    for number, (start, length) in enumerate(asked):
        n = min(length, SPANS[0])
        if n and spans.found(n)[1][start : start + length - n + 1].any():
            seen.append(number)
    found = {n: spans.found(n) for n in SPANS}
    return Overlap(
        unit=unit, units=n_units, is_part=is_part, lines=lines.share(),
        spans={n: Share(int(all_.sum()), int(hits.sum())) for n, (all_, hits) in found.items()},
        longest=stretch(*spans.longest),
        stretches=[stretch(*each) for each in spans.stretches(_EXAMPLES)],
        questions=Share(len(asked), len(seen)) if n_questions else None,
        questions_found=tuple(seen),
    )  # fmt: skip


def token_pieces(tokens: Tokens, tokenizer: Tokenizer, most: int | None = None) -> Iterator[Piece]:
    """Yield the text of tokens, or of the first `most`, with these as units.

    Raises:
        DataError: There is an id that the tokenizer does not have.
    """
    texts = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    for token in tokenizer.ends:
        texts[token] = b"\xff"
    if tokenizer.chat is not None:
        texts[tokenizer.chat.start] += b"\0"
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    n_tokens = min(len(tokens), len(tokens) if most is None else most)
    for start in range(0, n_tokens, _PART):
        units = tokens.read(start, min(_PART, n_tokens - start)).astype(np.int64)
        if (highest := int(units.max())) >= len(texts):
            raise DataError(f"a shard holds id {highest}, the vocabulary has {len(texts)}")
        text = b"".join(map(texts.__getitem__, units.tolist()))
        units[np.isin(units, tokenizer.ends)] = -1
        yield decoder.decode(text), units
    yield decoder.decode(b"", final=True), np.empty(0, np.int64)


def word_pieces(texts: Iterable[str], numbers: dict[str, int], *, learn: bool) -> Iterator[Piece]:
    """Yield texts with their words as units, by number; those unknown are learned, or -1."""
    held = ""
    numbers.setdefault(BORDER, -1)
    for text in chain(texts, [BORDER]):
        words = _ALONE.sub(r" \g<0> ", held + text).split()
        held = ""
        if words and not text[-1:].isspace() and text[-1:] != BORDER:
            held = words.pop() if len(words[-1]) < _LONGEST_WORD else ""
        if learn:
            for word in words:
                numbers.setdefault(word, len(numbers) - 1)
        yield text, np.fromiter((numbers.get(word, -1) for word in words), np.int64, len(words))


def _texts(place: Path, split: Split, field: str, errors: str) -> Iterator[str]:
    """Yield the documents of a folder's split, or of a file, each with a border after it."""
    if place.is_dir():
        manifest = read_manifest(place)
        with TokenReader(place, manifest, split) as tokens:
            for text, _ in token_pieces(tokens, read_tokenizer(place, manifest)):
                yield text
        return
    for file in files_in(place):
        if suffix_of(file) in ROW_SUFFIXES:
            yield from (text + BORDER for text in read_rows(file, field, errors))
        else:
            yield from chain(read_text(file, errors, SAFE_CUT), [BORDER])


def overlap(
    a: Path,
    b: Path,
    *,
    split: Split = "val",
    field: str = "text",
    errors: str = "strict",
    questions: Sequence[str] = (),
) -> Overlap:
    """Compare the second of two texts, or `questions` in place of it, with the first.

    Args:
        a: A prepared folder, whose training split is read, or a file of text.
        b: A prepared folder or a file of text.
        split: Of B.
        field: The one with the text, in files of rows.
        errors: "strict" or "replace", for bytes that are not UTF-8.
        questions: The texts of B.

    Raises:
        DataError: A text cannot be read.
    """
    folders = [place for place in (a, b) if place.is_dir() and not questions]
    manifests = [read_manifest(place) for place in folders]
    if len({manifest.tokenizer.sha256 for manifest in manifests}) == 1 < len(manifests):
        tokenizer = read_tokenizer(a, manifests[0])
        with (
            TokenReader(a, manifests[0], "train") as train,
            TokenReader(b, manifests[1], split) as other,
        ):
            return compare(
                token_pieces(train, tokenizer), token_pieces(other, tokenizer), unit="token",
                show=lambda units: tokenizer.decode(units.tolist()),
            )  # fmt: skip
    numbers: dict[str, int] = {}
    texts = _texts(b, split, field, errors)
    if questions:
        texts = (question.replace(BORDER, " ") + BORDER for question in questions)

    def show(units: Ints) -> str:
        words: list[Any] = list(numbers)
        return " ".join(words[unit + 1] for unit in units.tolist())

    return compare(
        word_pieces(_texts(a, "train", field, errors), numbers, learn=False),
        word_pieces(texts, numbers, learn=True),
        unit="word", show=show, n_questions=len(questions),
    )  # fmt: skip
