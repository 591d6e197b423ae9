"""How much is held out: the share that was asked for, also where there are few rows."""

import json
from pathlib import Path

import numpy as np
import pytest

from gptcli.config import load_config
from gptcli.data import writer
from gptcli.data.prepare import make_plan, prepare
from gptcli.seeding import derive_uniform
from gptcli.tokenizers import load_tokenizer, tokenizer_from
from support.folders import Encoded, Prepared, TokensOf, Write
from support.texts import as_jsonl

BYTES = tokenizer_from({"name": "bytes"})


def as_rows(count: int) -> tuple[list[str], str]:
    """Return texts of various lengths, and a jsonl file of them."""
    texts = [f"row {i} " * (3 + i * 7 % 11) for i in range(count)]
    return texts, "".join(json.dumps({"text": text}) + "\n" for text in texts)


@pytest.mark.parametrize("n_rows", [1, 2, 3, 5, 8, 20, 61, 99])
def test_of_few_rows_the_end_is_held_out(
    write: Write, n_rows: int, prepared: Prepared, tokens_of: TokensOf, encoded: Encoded
) -> None:
    texts, content = as_rows(n_rows)
    write("a.jsonl", content)
    manifest = prepared("a.jsonl", "data.val_fraction=0.1")
    tokens = encoded(BYTES, *texts)
    assert tokens_of(manifest, "train") == tokens[: int(len(tokens) * 0.9)]
    assert tokens_of(manifest) == tokens
    assert manifest.documents == n_rows
    assert manifest.bytes.train + manifest.bytes.val == sum(map(len, texts))
    held_out = np.array(tokens_of(manifest, "val"))
    assert manifest.bytes.val == (held_out != BYTES.eot).sum()


def test_from_a_hundred_rows_on_rows_are_drawn(
    write: Write, prepared: Prepared, tokens_of: TokensOf, encoded: Encoded
) -> None:
    texts, content = as_rows(100)
    write("rows/a.jsonl", content[: content.index('{"text": "row 60')])
    write("rows/b.jsonl", content[content.index('{"text": "row 60') :])
    manifest = prepared("rows")
    drawn = [
        text
        for unit, first, last in ((0, 0, 60), (1, 60, 100))
        for i, text in enumerate(texts[first:last])
        if derive_uniform("split", 1337, unit, i) < 0.1
    ]
    assert 0 < len(drawn) < 30
    assert tokens_of(manifest, "val") == encoded(BYTES, *drawn)


def test_the_end_does_not_depend_on_batches_and_files(
    write: Write, monkeypatch: pytest.MonkeyPatch, prepared: Prepared
) -> None:
    _, content = as_rows(30)
    write("rows/a.jsonl", content)
    write("rows/b.csv", "text\none,\ntwo\n")
    whole = prepared("rows", "data.val_fraction=0.2")
    monkeypatch.setattr(writer, "_BATCH_TEXTS", 4)
    again = prepared("rows", "data.val_fraction=0.2", out=Path("data/again"), workers=2)
    assert again.model_dump() == whole.model_dump()
    assert all(unit.tokens.val for unit in whole.units)


def test_a_vocabulary_is_learned_without_the_end(write: Write, prepared: Prepared) -> None:
    write("a.jsonl", as_jsonl(["seen " * 50, "no " * 9]))
    manifest = prepared("a.jsonl", "tokenizer.name=bpe", "data.val_fraction=0.2")
    tokenizer = load_tokenizer(Path("data/out"))
    learned = [tokenizer.token_bytes(id) for id in range(manifest.tokenizer.vocab_size)]
    assert any(b"seen" in token for token in learned)
    assert not any(b"no" in token for token in learned)


def test_data_with_validation_text_of_its_own_says_so(write: Write, prepared: Prepared) -> None:
    write("a.txt", "some text " * 30)
    write("b.txt", "other text " * 20)
    plan = make_plan(load_config(None, ["data.source={train: a.txt, val: b.txt}"]))
    assert prepare(plan).has_own_val
    assert not prepared("a.txt").has_own_val
    assert not prepared("a.txt", "data.val_fraction=0", out=Path("data/none")).has_own_val
