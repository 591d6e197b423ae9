"""stdin, validation text of its own, vocabularies from files, and the plan before the work."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import gptcli.data.estimate
from gptcli.config import load_config
from gptcli.data.columns import parquet_text_bytes
from gptcli.data.estimate import estimate, require_room
from gptcli.data.prepare import make_plan
from gptcli.data.shards import TokenReader, read_manifest
from gptcli.errors import StorageError
from support.folders import Usage

BYTES = ("-s", "tokenizer.name=bytes")


def tokens_of(folder: str, split: str) -> bytes:
    """Return a split's tokens as bytes, end-of-text left out."""
    manifest = read_manifest(Path(folder))
    with TokenReader(Path(folder), manifest, split) as tokens:  # type: ignore[arg-type]
        return bytes(token for token in tokens.read(0, len(tokens)).tolist() if token < 256)


def test_text_comes_from_stdin(gpt: Any) -> None:
    text = "some text that is piped in\n" * 20
    done = gpt("prepare", "-", *BYTES, "--json", stdin=text.encode())
    assert done.code == 0 and done.json["dir"] == str(Path("data/stdin"))
    assert tokens_of("data/stdin", "train") + tokens_of("data/stdin", "val") == text.encode()
    assert gpt("prepare", "-", *BYTES, "--out", "data/none", stdin=b"").code == 3


def test_training_and_validation_text_come_from_two_places(gpt: Any) -> None:
    Path("one.txt").write_text("to train on " * 30)
    Path("two.jsonl").write_text(json.dumps({"text": "to validate on"}) + "\n")
    source = "data.source={train: one.txt, val: two.jsonl}"
    done = gpt("prepare", "-s", source, *BYTES, "--json")
    assert done.code == 0, done.err
    assert done.json["dir"] == str(Path("data/one"))
    assert tokens_of("data/one", "train") == b"to train on " * 30
    assert tokens_of("data/one", "val") == b"to validate on"
    refused = gpt("prepare", "-s", source, "-s", "data.val_fraction=0.1")
    assert refused.code == 2 and "names its own validation text" in refused.err


def test_two_places_in_a_file_train(gpt: Any, tiny_set: list[str]) -> None:
    Path("one.txt").write_text("to train on " * 30)
    Path("two.txt").write_text("to validate on " * 30)
    Path("run.yaml").write_text("data:\n  source:\n    train: one.txt\n    val: two.txt\n")
    words = ["-c", "run.yaml", *BYTES, "-s", "data.dir=data/two"]
    assert gpt("prepare", *words).code == 0
    assert gpt("train", "-c", "run.yaml", *tiny_set, "-s", "data.dir=data/two").code == 0
    Path("run.yaml").write_text("data:\n  source:\n    train: one.txt\n    validation: two.txt\n")
    assert "data.source" in gpt("prepare", "-c", "run.yaml").err


def test_a_character_vocabulary_comes_from_a_file(gpt: Any) -> None:
    Path("vocab.txt").write_text("abcxyz \n")
    Path("text.txt").write_text("abc cab " * 20)
    words = ["-s", "tokenizer.name=char", "-s", "tokenizer.path=vocab.txt"]
    assert gpt("prepare", "text.txt", *words, "--json").json["vocab_size"] == 9
    Path("other.txt").write_text("abcd " * 20)
    refused = gpt("prepare", "other.txt", *words)
    assert refused.code == 3 and "'d' (U+0064)" in refused.err
    assert gpt("prepare", "text.txt", "-s", "tokenizer.path=vocab.txt").code == 2


def test_the_plan_is_close_to_what_comes_out(gpt: Any, corpus: Path) -> None:
    planned = gpt("prepare", str(corpus), "--dry-run", "--json").json
    made = gpt("prepare", str(corpus), "--json").json
    total = made["tokens"]["train"] + made["tokens"]["val"]
    assert planned["tokens"] == pytest.approx(total, rel=0.02)
    assert planned["shard_bytes"] == 2 * planned["tokens"]
    assert planned["free_bytes"] > planned["disk_bytes"]


def test_the_plan_is_in_plain_words_and_numbers(gpt: Any) -> None:
    Path("t.txt").write_text("the cat sat on the mat\n" * 900)
    said = gpt("prepare", "t.txt", *BYTES, "--dry-run").out
    assert "t.txt, 1 file, 20.7 kB\n" in said
    assert "about 20.7k tokens, 10% for validation, less than a second of work\n" in said
    none = gpt("prepare", "t.txt", *BYTES, "-s", "data.val_fraction=0", "--dry-run").out
    assert "tokens, none for validation," in none
    split = "data.source={train: t.txt, val: t.txt}"
    assert "its own split for validation" in gpt("prepare", *BYTES, "-s", split, "--dry-run").out


def test_the_plan_knows_what_is_in_the_folder(gpt: Any) -> None:
    Path("t.txt").write_text("the cat sat on the mat\n" * 20)
    assert gpt("prepare", "t.txt", *BYTES).code == 0
    before = sorted(Path("data/t").iterdir())
    other = ("prepare", "t.txt", "-s", "tokenizer.name=char")
    for json_ in ([], ["--json"]):
        planned, done = gpt(*other, "--dry-run", *json_), gpt(*other, *json_)
        assert planned.code == done.code == 2 and planned.err == done.err != ""
    assert gpt(*other, "--force", "--dry-run").code == 0
    again = gpt("prepare", "t.txt", *BYTES, "--dry-run")
    assert again.code == 0 and "is prepared already" in again.err
    assert sorted(Path("data/t").iterdir()) == before


def test_a_disk_that_is_too_small_is_refused_before_the_work(
    gpt: Any, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptcli.data.estimate.shutil, "disk_usage", lambda path: Usage(10, 0, 10))
    done = gpt("prepare", str(corpus))
    assert done.code == 5 and "needs about" in done.err and not Path("data").exists()
    monkeypatch.undo()
    plan = make_plan(load_config(None, [f"data.source={corpus}"]))
    found = estimate(plan)
    assert found.free_bytes == pytest.approx(shutil.disk_usage(".").free, rel=0.01)
    require_room(plan, found)
    with pytest.raises(StorageError):
        require_room(plan, replace(found, disk_bytes=10, free_bytes=9))


def test_no_source_to_read_from(gpt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpt("prepare", "shakespeare:part").code == 2


def test_parquet_says_how_much_text_is_in_it() -> None:
    rows = ["the same words again and again " * 50] * 4000
    table = pa.table({"text": rows, "other": ["x" * 99] * 4000})
    pq.write_table(table, "a.parquet", use_dictionary=False)
    assert Path("a.parquet").stat().st_size < 1_000_000
    found = estimate(make_plan(load_config(None, ["data.source=a.parquet"])))
    assert found.text_bytes == pytest.approx(sum(map(len, rows)), rel=0.05)
    Path("b.parquet").write_bytes(b"PAR1 no footer")
    assert parquet_text_bytes(Path("b.parquet"), "text") is None


@pytest.mark.parametrize(
    ("words", "bytes_each", "of_text"),
    [
        (["tokenizer.name=char"], 2, 1.0),
        (["tokenizer.name=bpe"], 2, 3.5),
        (["tokenizer.name=bpe", "tokenizer.vocab_size=70000"], 4, 3.5),
    ],
)
def test_a_plan_asks_the_tokenizer_what_its_tokens_take(
    corpus: Path, words: list[str], bytes_each: int, of_text: float
) -> None:
    found = estimate(make_plan(load_config(None, [f"data.source={corpus}", *words])))
    assert found.shard_bytes == bytes_each * found.tokens
    assert found.tokens == round(found.text_bytes / of_text)
