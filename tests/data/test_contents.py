"""What is in a data folder, against counts by hand."""

import json
from pathlib import Path

import pytest

from gptcli import prepare
from gptcli.config import load_config
from gptcli.data import contents as module
from gptcli.data.contents import Contents, measure
from gptcli.data.shards import TokenReader, read_manifest, read_tokenizer

TEXTS = ["a" * 5, "", "été 東京", "a" * 5, "b1, \t" * 40, "a" * 5, "c"]


def measured(folder: Path, **how: int) -> Contents:
    """Measure a folder."""
    return measure(folder, read_manifest(folder), **how)


def prepared(rows: list[dict[str, str]], **flags: object) -> Path:
    """Prepare rows as bytes."""
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"data.source": "rows.jsonl", "data.dir": "rows", "tokenizer.name": "bytes"}
    return prepare(load_config(None, flags=given | flags)).folder


@pytest.fixture
def rows() -> Path:
    """Texts without a validation split."""
    return prepared([{"text": text} for text in TEXTS], **{"data.val_fraction": 0.0})


def test_documents_are_counted_as_they_were_given(rows: Path) -> None:
    found = measured(rows)
    sizes = [len(text.encode()) for text in TEXTS if text]
    assert (found.documents, found.empty_documents) == (6, 1)
    assert found.tokens_read == sum(sizes) + len(TEXTS)
    assert found.longest == max(sizes) == 200 and found.median_length == 5
    assert found.mean_length == pytest.approx(sum(sizes) / 6)
    powers = {1: 1, 4: 3, 8: 1, 128: 1}
    assert found.lengths == [(1 << i, powers.get(1 << i, 0)) for i in range(8)]
    assert found.tokens_per_byte == 1.0


def test_copies_are_found_and_the_most_copied_is_shown(rows: Path) -> None:
    found = measured(rows)
    assert (found.copies, found.most_copies, found.copies_in_val) == (2, 3, 0)
    assert found.most_copied is not None and found.most_copied.text == "aaaaa"
    assert {each.text for each in found.samples} <= {*TEXTS, (TEXTS[4] * 2)[:200]}


def test_characters_are_counted_by_script_and_kind(rows: Path) -> None:
    assert measured(rows).characters == {
        "white space": 81, "Latin letters": 59, "digits": 40, "punctuation": 40, "CJK letters": 2,
    }  # fmt: skip
    assert measured(rows).frequent[0] == (32, " ", 41)


def test_documents_across_parts_are_one(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measured(rows)
    for size in (1, 2, 7, 50):
        monkeypatch.setattr("gptcli.data.overlap._PART", size)
        assert measured(rows) == whole


def test_the_beginning_of_a_long_split_is_read(rows: Path) -> None:
    found = measured(rows, most_tokens=21)
    assert (found.tokens_read, found.documents) == (21, 2)


def test_a_validation_document_of_the_training_split_is_noticed() -> None:
    texts = [f"text {i % 40}" for i in range(200)]
    folder = prepared([{"text": text} for text in texts], **{"data.val_fraction": 0.2})
    found, manifest = measured(folder), read_manifest(folder)
    assert found.documents == 200 and found.copies == 160
    tokenizer = read_tokenizer(folder, manifest)
    with TokenReader(folder, manifest, "val") as tokens:
        n_val = int((tokens.read(0, len(tokens)) == tokenizer.eot).sum())
    assert 0 < found.copies_in_val <= n_val


def test_conversations_are_documents() -> None:
    talks = [{"prompt": f"What is {i % 3}?", "completion": f"{i % 3}"} for i in range(30)]
    found = measured(prepared(talks))
    assert (found.documents, found.copies) == (30, 27)
    assert found.most_copied is not None and "What is" in found.most_copied.text
    assert found.median_length == found.longest


def test_characters_that_tokens_cut_are_counted_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = prepared([{"text": "日本語" * 9}], **{"data.val_fraction": 0.0})
    monkeypatch.setattr("gptcli.data.overlap._PART", 4)
    assert measured(folder).characters == {"CJK letters": 27}
    assert module.MOST_TOKENS >= 1_000_000


def test_letters_of_compatibility_count_as_those_they_stand_for() -> None:
    folder = prepared(
        [{"text": "\u00b5\u2126 \u00aa\ufb01\uff21 \ufe70"}] * 9, **{"data.val_fraction": 0.0}
    )
    assert measured(folder).characters == {
        "Latin letters": 27, "Greek letters": 18, "white space": 18, "Arabic letters": 9,
    }  # fmt: skip
