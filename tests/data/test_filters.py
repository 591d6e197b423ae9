"""Rules that leave documents out: what they take, what they count, what they refuse."""

import json
import time
from pathlib import Path

import pytest

from gptcli.config import load_config
from gptcli.config.schema import FilterConfig
from gptcli.data import filters, readers, shards
from gptcli.data.conversations import skipped_rows
from gptcli.data.estimate import left_out
from gptcli.data.filters import Rules
from gptcli.data.prepare import make_plan
from gptcli.errors import DataError
from gptcli.seeding import derive_uniform
from gptcli.tokenizers import load_tokenizer, tokenizer_from
from support.folders import Encoded, Prepared, Refusal, TokensOf, Write
from support.texts import as_jsonl

BYTES = tokenizer_from({"name": "bytes"})
GERMAN = "Dieser Satz ist auf Deutsch geschrieben, damit man die Sprache daran erkennen kann."
ENGLISH = "This sentence is written in English, so that the language can be told from it."


def reason(text: str, **rules: object) -> str | None:
    """Return why rules leave a text out."""
    return Rules(FilterConfig.model_validate(rules))(iter([text]), "a.txt")


@pytest.mark.parametrize(
    ("rules", "kept", "taken", "because"),
    [
        ({"min_chars": 3}, "abc", "ab", "shorter than min_chars"),
        ({"max_chars": 3}, "abc", "abcd", "longer than max_chars"),
        ({"min_letters": 0.5}, "ab 12", "ab 123", "fewer letters than min_letters"),
        ({"min_letters": 0.5}, "éü 12", "éü 123", "fewer letters than min_letters"),
        ({"min_letters": 0.5}, "a", " \n", "fewer letters than min_letters"),
        ({"max_repeated_lines": 0.5}, "a\nb\n\n\na", "a\n a\n\nb\na\na",
         "more repeated lines than max_repeated_lines"),
        ({"exclude": r"(?i)lorem\s+ipsum"}, "lorem", "A Lorem\nipsum", "matches exclude"),
        ({"languages": ["de"]}, GERMAN, ENGLISH, "not in languages"),
        ({"languages": ["de", "en"]}, ENGLISH, "1 + 2 = 3", "not in languages"),
    ],
)  # fmt: skip
def test_a_rule_takes_what_it_says(
    rules: dict[str, object], kept: str, taken: str, because: str
) -> None:
    assert reason(kept, **rules) is None
    assert reason(taken, **rules) == because


def test_the_first_rule_that_matches_is_counted_and_an_empty_document_is_short() -> None:
    assert reason("", min_chars=1, exclude="x") == "shorter than min_chars"
    assert reason("x", min_chars=2, exclude="x") == "shorter than min_chars"
    assert reason("", exclude="x", max_repeated_lines=0.0) is None


def test_documents_are_left_out_and_counted_by_unit(
    write: Write, prepared: Prepared, tokens_of: TokensOf, encoded: Encoded
) -> None:
    texts = [f"row {i} " * (1 + i % 5) for i in range(130)]
    write("rows/a.jsonl", as_jsonl(texts[:100]))
    write("rows/b.jsonl", as_jsonl([*texts[100:], "lorem ipsum dolor sit amet"]))
    manifest = prepared("rows", "data.filters={min_chars: 12, exclude: lorem}")
    kept: dict[str, list[str]] = {"train": [], "val": []}
    for unit, part in enumerate((texts[:100], texts[100:])):
        for i, text in enumerate(part):
            if len(text) >= 12:  # what stays is in the split that it is in without filters
                kept["val" if derive_uniform("split", 1337, unit, i) < 0.1 else "train"] += [text]
    assert tokens_of(manifest, "train") == encoded(BYTES, *kept["train"])
    assert tokens_of(manifest, "val") == encoded(BYTES, *kept["val"])
    assert manifest.documents == len(kept["train"]) + len(kept["val"])
    n_short = [sum(len(text) < 12 for text in part) for part in (texts[:100], texts[100:])]
    a, b = (unit.skipped for unit in manifest.units)
    assert a is not None and b is not None
    assert a["shorter than min_chars"].rows == n_short[0]
    assert {reason: each.rows for reason, each in b.items()} == {
        "shorter than min_chars": n_short[1], "matches exclude": 1
    }  # fmt: skip
    assert a["shorter than min_chars"].first == "rows/a.jsonl: document 1: 'row 0'"
    assert b["matches exclude"].first == (
        "rows/b.jsonl: document 31: 'lorem ipsum dolor sit amet'"
    )  # fmt: skip
    assert manifest.recipe.filters == {"min_chars": 12, "exclude": "lorem"}
    assert shards.read_manifest(Path("data/out")) == manifest


def test_a_long_text_file_is_judged_by_its_start_and_its_whole_length(
    write: Write, monkeypatch: pytest.MonkeyPatch, prepared: Prepared
) -> None:
    monkeypatch.setattr(readers, "_BLOCK_BYTES", 64)
    write("texts/long.txt", "some words " * 50)
    write("texts/longer.txt", "some words " * 100)
    write("texts/noise.txt", "1 2 3 4 " * 40 + "words " * 1000)
    manifest = prepared("texts", "data.filters={max_chars: 900, min_letters: 0.1}")
    assert {reason: (each.rows, each.first) for reason, each in
            skipped_rows(manifest.units).items()} == {
        "longer than max_chars": (2, "texts/longer.txt: document 1: 'some words some words some"
                                     " words some words some words some'"),
    }  # fmt: skip
    manifest = prepared("texts", "data.filters={min_letters: 0.3}", out=Path("data/b"))
    assert list(skipped_rows(manifest.units)) == ["fewer letters than min_letters"]
    assert manifest.documents == 2 and manifest.bytes.total == 1650


def test_conversations_are_filtered_as_a_whole(write: Write, prepared: Prepared) -> None:
    rows = [{"prompt": "Hello there?", "completion": f"Hello {'x' * i}"} for i in range(120)]
    rows[3] = {"prompt": "What is lorem?", "completion": "A word."}
    write("chat.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    manifest = prepared("chat.jsonl", "data.filters={exclude: lorem, max_chars: 100}")
    found = skipped_rows(manifest.units)
    assert found["matches exclude"].rows == 1
    assert found["matches exclude"].first == "chat.jsonl: line 4: 'What is lorem? A word.'"
    assert manifest.documents == 120 - 1 - found["longer than max_chars"].rows


def test_a_vocabulary_is_learned_from_what_stays(write: Write, prepared: Prepared) -> None:
    write("a.jsonl", as_jsonl(["seen " * 50, "gone " * 50, "seen too " * 9, "seen again " * 4]))
    manifest = prepared("a.jsonl", "tokenizer.name=bpe", "data.filters.exclude=gone",
                        "data.val_fraction=0")  # fmt: skip
    tokenizer = load_tokenizer(Path("data/out"))
    learned = [tokenizer.token_bytes(id) for id in range(manifest.tokenizer.vocab_size)]
    assert any(b"seen" in token for token in learned)
    assert not any(b"gone" in token for token in learned)


def test_a_search_that_explodes_is_an_error_with_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filters, "_SECONDS", 0.2)
    began = time.process_time()
    with pytest.raises(DataError, match=r"a\.txt: data\.filters\.exclude took more than") as caught:
        reason("a" * 60 + "b", exclude="(a|aa)+$")
    assert time.process_time() - began < 5
    assert "simplify" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("exclude='(a'", "data.filters.exclude: not a regular expression"),
        ("languages=[english]", "data.filters.languages: unknown code 'english'"),
        ("min_letters=2", "data.filters.min_letters"),
        ("min_char=2", "did you mean"),
    ],
)
def test_rules_that_make_no_sense_are_refused(
    write: Write, refusal: Refusal, rule: str, message: str
) -> None:
    write("a.txt", "some text")
    error = refusal("a.txt", f"data.filters.{rule}", code=2)
    assert message in f"{error.message} {error.hint}"
    assert not Path("data").exists()


def test_other_filters_are_other_data(write: Write, prepared: Prepared, refusal: Refusal) -> None:
    write("a.txt", "some text " * 20)
    first = prepared("a.txt", "data.filters.min_chars=3")
    assert prepared("a.txt", "data.filters.min_chars=3") == first
    for other in ("data.filters.min_chars=4", "data.filters=null"):
        assert "differs in: filters" in refusal("a.txt", other, code=2).message


def test_a_source_of_which_nothing_stays_is_refused(write: Write, refusal: Refusal) -> None:
    write("a.jsonl", as_jsonl(["one", "two"]))
    error = refusal("a.jsonl", "data.filters.min_chars=99")
    assert error.message == "a.jsonl: everything is left out (2 shorter than min_chars)"
    assert not Path("data").exists()


def test_what_would_be_left_out_is_shown_before(write: Write) -> None:
    write("a.jsonl", as_jsonl([f"text number {i} " * (i % 3) for i in range(30)]))
    plan = make_plan(load_config(None, ["data.source=a.jsonl", "data.filters.min_chars=10"]))
    found = left_out(plan)
    assert (found.documents, found.rows) == (30, {"shorter than min_chars": 10})
    assert found.examples["shorter than min_chars"][1] == "a.jsonl: document 4: ''"
    assert len(found.examples["shorter than min_chars"]) == 3
