"""What two texts share, against a count by brute force."""

import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcli import prepare
from gptcli.config import load_config
from gptcli.data import overlap as module
from gptcli.data.overlap import BORDER, Ints, Overlap, Share, Spans, overlap, word_pieces
from support.texts import sentences

FEW = st.lists(st.integers(-1, 2), max_size=40)


def spans_of(units: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """Return the spans of n units, none of them across a border."""
    spans = (tuple(units[i : i + n]) for i in range(len(units) - n + 1))
    return [span for span in spans if -1 not in span]


@settings(max_examples=300, deadline=None)
@given(st.lists(FEW, max_size=6), FEW, st.integers(1, 15))
def test_spans_equal_those_of_a_brute_force_count(
    parts: list[list[int]], b: list[int], n: int
) -> None:
    """Text A comes in parts, and spans may cross them."""
    a = [unit for part in parts for unit in part]
    spans = Spans(np.array(b, np.int64), [n])
    for part in parts:
        spans.feed(np.array(part, np.int64))
    for length in {n, 13, 50}:
        known, [is_span, is_found] = set(spans_of(a, length)), spans.found(length)
        expected = spans_of(b, length)
        assert is_span.sum() == len(expected)
        assert is_found.sum() == sum(span in known for span in expected)
    start, longest = spans.longest
    common = [m for m in range(1, len(b) + 1) if set(spans_of(a, m)) & set(spans_of(b, m))]
    assert longest == max(common, default=0)
    if longest:
        assert tuple(b[start : start + longest]) in spans_of(a, longest)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_long_common_spans_across_parts_are_found_whole(data: st.DataObject) -> None:
    b = data.draw(st.lists(st.integers(0, 1), min_size=60, max_size=200))
    start = data.draw(st.integers(0, len(b) - 1))
    copied = b[start : start + data.draw(st.integers(1, 200))]
    a = [2, *copied, 2, *b[:55], 2]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(a)), max_size=5)))
    spans = Spans(np.array(b, np.int64))
    for first, last in zip([0, *cuts], [*cuts, len(a)], strict=True):
        spans.feed(np.array(a[first:last], np.int64))
    known = set(spans_of(a, 50))
    assert spans.found(50)[1].sum() == sum(span in known for span in spans_of(b, 50))
    assert spans.longest[1] >= max(len(copied), min(55, len(b)))


def test_a_text_of_one_unit_is_compared_in_time() -> None:
    spans = Spans(np.zeros(100_000, np.int64))
    for _ in range(3):
        spans.feed(np.zeros(150_000, np.int64))
    assert spans.longest == (0, 100_000) and spans.stretches(3) == [(0, 100_000)]


def words(text: str) -> list[str]:
    """Return the words of a text that comes in one piece."""
    numbers: dict[str, int] = {}
    [(_, units), *_] = word_pieces([text + BORDER], numbers, learn=True)
    return [list(numbers)[unit + 1] for unit in units.tolist() if unit >= 0]


def test_words_are_what_spaces_part_and_every_ideograph() -> None:
    assert words("It's 12.5\n\tkg, no?  ") == ["It's", "12.5", "kg,", "no?"]
    assert words("Tokyo 東京です na\u00efve") == ["Tokyo", "東", "京", "で", "す", "na\u00efve"]


def test_a_word_that_two_pieces_share_is_one() -> None:
    numbers: dict[str, int] = {}
    pieces = list(word_pieces(["one tw", "o th", "ree", BORDER + "four"], numbers, learn=True))
    assert list(numbers) == [BORDER, "one", "two", "three", "four"]
    units: Ints = np.concatenate([units for _, units in pieces])
    assert units.tolist() == [0, 1, 2, -1, 3, -1]


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two texts: the second has 60 words and a line of the first, among its own."""
    first = sentences(400)
    (tmp_path / "a.txt").write_text(first)
    copied = " ".join(first.split()[800:860])
    own = "\n".join(f"word{i} of{i} mine{i}" for i in range(50))
    (tmp_path / "b.txt").write_text(f"{own}\nX {copied} Y\n{first.splitlines()[7]}\n\n")
    return tmp_path / "a.txt", tmp_path / "b.txt"


def test_texts_are_compared_by_lines_and_words(pair: tuple[Path, Path]) -> None:
    found = overlap(*pair)
    assert (found.unit, found.is_part) == ("word", False)
    assert found.lines == Share(52, 1)
    assert found.units == 150 + 62 + 8
    assert found.spans == {13: Share(208, 48), 50: Share(171, 11)}
    assert found.longest.units == 60 and found.longest.start == 151
    assert found.stretches == [found.longest]
    assert found.longest.text == " ".join(pair[0].read_text().split()[800:860])


def prepared(file: Path, out: str, tokenizer: str) -> Path:
    """Prepare a text file."""
    flags = {"data.source": str(file), "data.dir": out, "tokenizer.name": tokenizer}
    return prepare(load_config(None, flags=flags)).folder


def test_folders_of_one_tokenizer_are_compared_by_tokens(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    a, b = prepared(pair[0], "a", "bytes"), prepared(pair[1], "b", "bytes")
    train = overlap(a, b, split="train")
    assert train.unit == "token" and train.longest.units == len(train.longest.text) == 34
    assert all(train.longest.text in file.read_text() for file in pair)
    assert overlap(a, a).unit == "token"
    mixed = overlap(a, prepared(pair[1], "gpt2", "gpt2"))
    assert mixed.unit == "word"
    assert overlap(pair[0], b, split="train").unit == "word"


def test_spans_and_lines_do_not_cross_documents(tmp_path: Path) -> None:
    rows = [" ".join(f"w{i}" for i in range(start, start + 10)) for start in (0, 10)]
    for name, order in (("a", rows), ("b", rows[::-1])):
        lines = (json.dumps({"body": row}) + "\n" for row in order)
        (tmp_path / f"{name}.jsonl").write_text("".join(lines))
    found = overlap(Path("a.jsonl"), Path("b.jsonl"), field="body")
    assert found.spans[13] == Share(0, 0)
    assert found.lines == Share(2, 2) and found.longest.units == 10


def test_texts_in_an_archive_are_compared(pair: tuple[Path, Path]) -> None:
    with tarfile.open("b.tar", "w") as archive:
        archive.add(pair[1], "b.txt")
    assert overlap(pair[0], Path("b.tar")) == overlap(*pair)


def asked(text: str, *questions: str) -> Overlap:
    """Look for questions in a text."""
    Path("a.txt").write_text(text)
    return overlap(Path("a.txt"), Path("b.jsonl"), questions=questions)


def test_questions_are_found_by_a_span_or_if_short_as_a_whole() -> None:
    long = " ".join(f"q{i}" for i in range(30))
    text = f"It was said: {' '.join(long.split()[4:17])} and Who wrote it? at the end"
    found = asked(text, long, "Who wrote it?", "Who wrote that?", "", "said:")
    assert found.questions == Share(5, 3) and found.questions_found == (0, 1, 4)


def test_an_empty_text_has_nothing_in_common(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two\n")
    (tmp_path / "b.txt").write_text(" \n")
    found = overlap(tmp_path / "a.txt", tmp_path / "b.txt")
    assert (found.units, found.lines, found.longest.units) == (0, Share(0, 0), 0)
    assert overlap(tmp_path / "b.txt", tmp_path / "a.txt").longest.units == 0


def test_of_a_huge_second_text_the_beginning_is_compared(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("c.jsonl").write_text("".join(json.dumps({"text": f"{i} " * 30}) + "\n" for i in "1234"))
    monkeypatch.setattr(module, "MOST_UNITS", 60)
    found = overlap(pair[0], Path("c.jsonl"))
    assert found.is_part and found.units == 60
    monkeypatch.setattr(module, "MOST_UNITS", 120)
    found = overlap(pair[0], Path("c.jsonl"))
    assert not found.is_part and found.units == 120
