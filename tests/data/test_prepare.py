"""Text to shards: every token in its place, and the same bytes every time."""

import gzip
import hashlib
from pathlib import Path
from typing import Any

import pytest

from gptcli.data import readers, shards, writer
from gptcli.seeding import derive_uniform
from gptcli.tokenizers import dump_tokenizer, load_tokenizer, tokenizer_from
from support.folders import Encoded, Prepared, Refusal, TokensOf, Write, content
from support.texts import as_jsonl

OUT = Path("data/out")
BYTES = tokenizer_from({"name": "bytes"})
TEXT = "".join(
    f"Line {i}: it's na\u00efve \U0001f600\r\n\n    indented  twice, <|endoftext|> {i * 7919}.\n"
    for i in range(60)
)


@pytest.mark.parametrize("name", ["gpt2", "bytes", "char", "bpe"])
@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_train_and_validation_are_the_text(
    write: Write,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    suffix: str,
    prepared: Prepared,
    tokens_of: TokensOf,
    encoded: Encoded,
) -> None:
    """In whatever pieces a file is read, its tokens are those of the whole text."""
    monkeypatch.setattr(readers, "_BLOCK_BYTES", 64)
    monkeypatch.setattr(writer, "_SPOOL_BYTES", 100)
    write("a" + suffix, TEXT)
    sets = ["tokenizer.vocab_size=300"] if name == "bpe" else []
    manifest = prepared("a" + suffix, f"tokenizer.name={name}", *sets, "data.shard_tokens=150")
    tokenizer = load_tokenizer(OUT)
    assert tokens_of(manifest) == encoded(tokenizer, TEXT)
    n_tokens = manifest.tokens.train + manifest.tokens.val
    assert manifest.tokens.train == int(n_tokens * 0.9)
    validation = tokens_of(manifest, "val")
    assert manifest.bytes.train + manifest.bytes.val == len(TEXT.encode())
    assert manifest.bytes.val == len(tokenizer.decode_bytes(validation))
    assert TEXT.encode().endswith(tokenizer.decode_bytes(validation))
    listed = {shard.file for split in shards.SPLITS for shard in manifest.shards(split)}
    assert {path.name for path in OUT.iterdir()} == listed | {"manifest.json", "tokenizer.json"}


def test_the_manifest_tells_all(write: Write, prepared: Prepared) -> None:
    write("a.txt", TEXT)
    manifest = prepared("a.txt", "data.shard_tokens=2000")
    assert shards.read_manifest(OUT) == manifest
    assert shards.read_tokenizer(OUT, manifest).fingerprint == BYTES.fingerprint
    assert manifest.documents == 1
    for split in shards.SPLITS:
        for shard in manifest.shards(split):
            raw = (OUT / shard.file).read_bytes()
            assert shard.sha256 == hashlib.sha256(raw).hexdigest()
            assert len(raw) == 1024 + 2 * shard.tokens
        assert (
            sum(shard.tokens for shard in manifest.shards(split))
            == manifest.tokens.model_dump()[split]
        )
    assert manifest.recipe.model_dump(exclude={"tokenizer"}) == {
        "source": "a.txt", "revision": None, "text_field": "text", "encoding_errors": "strict",
        "val_fraction": 0.1, "seed": 1337, "shard_tokens": 2000, "max_vocab_size": None,
    }  # fmt: skip


def test_of_few_files_the_tail_of_each_is_held_out(
    write: Write, prepared: Prepared, tokens_of: TokensOf, encoded: Encoded
) -> None:
    texts = {"a": "alpha " * 50, "b": "", "c": "c", "d": "delta\n" * 30}
    for name, text in texts.items():
        write(f"folder/{name}.txt", text)
    manifest = prepared("folder", "data.val_fraction=0.25")
    train: list[int] = []
    val: list[int] = []
    for text in texts.values():
        ids = encoded(BYTES, text)
        head = int(len(ids) * 0.75)
        train += ids[:head]
        val += ids[head:]
    assert tokens_of(manifest, "train") == train
    assert tokens_of(manifest, "val") == val
    assert manifest.bytes.model_dump() == {
        "train": len(BYTES.decode_bytes(train)), "val": len(BYTES.decode_bytes(val))
    }  # fmt: skip
    assert manifest.documents == 4


def test_from_a_hundred_files_whole_files_are_held_out(
    write: Write, prepared: Prepared, tokens_of: TokensOf, encoded: Encoded
) -> None:
    texts = [f"file {i}" for i in range(120)]
    for i, text in enumerate(texts):
        write(f"folder/{i:03d}.txt", text)
    manifest = prepared("folder")
    split = ["val" if derive_uniform("split", 1337, 0, i) < 0.1 else "train" for i in range(120)]
    for name in shards.SPLITS:
        chosen = [text for text, drawn in zip(texts, split, strict=True) if drawn == name]
        assert tokens_of(manifest, name) == encoded(BYTES, *chosen)


def test_rows_are_held_out_whole_and_empty_ones_count(
    write: Write, prepared: Prepared, tokens_of: TokensOf, encoded: Encoded
) -> None:
    rows = [f"row {i}" * (i % 3) for i in range(300)]
    write("rows.jsonl", as_jsonl(rows))
    manifest = prepared("rows.jsonl", "seed=5", "data.val_fraction=0.2")
    split = ["val" if derive_uniform("split", 5, 0, i) < 0.2 else "train" for i in range(300)]
    for name in shards.SPLITS:
        chosen = [row for row, drawn in zip(rows, split, strict=True) if drawn == name]
        assert tokens_of(manifest, name) == encoded(BYTES, *chosen)
        assert manifest.bytes.model_dump()[name] == sum(map(len, chosen))
    assert manifest.documents == 300


def test_text_and_rows_of_a_folder_become_units_of_their_own(
    write: Write, prepared: Prepared, tokens_of: TokensOf, encoded: Encoded
) -> None:
    write("folder/b.txt", "some text " * 20)
    write("folder/a.jsonl", as_jsonl([f"row {i}" for i in range(50)]))
    write("folder/c.csv", "text\n" + "".join(f"cell {i}\n" for i in range(50)))
    manifest = prepared("folder", "data.val_fraction=0")
    assert [Path(unit.name).name for unit in manifest.units] == ["b.txt", "a.jsonl", "c.csv"]
    assert [shard.file for shard in manifest.shards("train")] == [
        "train_000000_000.bin", "train_000001_000.bin", "train_000002_000.bin"
    ]  # fmt: skip
    expected = [
        "some text " * 20,
        *(f"row {i}" for i in range(50)),
        *(f"cell {i}" for i in range(50)),
    ]
    assert tokens_of(manifest, "train") == encoded(BYTES, *expected)
    assert manifest.documents == 101


def test_vocabularies_over_uint16_get_uint32_shards(
    write: Write, prepared: Prepared, tokens_of: TokensOf
) -> None:
    text = "".join(map(chr, range(0x10000, 0x10000 + 65_536)))
    write("a.txt", text)
    manifest = prepared("a.txt", "tokenizer.name=char", "data.val_fraction=0")
    assert (manifest.dtype, manifest.tokenizer.vocab_size) == ("uint32", 65_537)
    assert tokens_of(manifest) == [65_536, *range(65_536)]


def test_no_validation_means_none(
    write: Write, prepared: Prepared, tokens_of: TokensOf, encoded: Encoded
) -> None:
    write("a.txt", TEXT)
    manifest = prepared("a.txt", "data.val_fraction=0")
    assert manifest.tokens.val == manifest.bytes.val == 0
    assert tokens_of(manifest, "train") == encoded(BYTES, TEXT)
    assert [path.name for path in OUT.glob("val_*")] == []


def test_replaced_bytes_are_counted_as_they_are_written(
    write: Write, prepared: Prepared, tokens_of: TokensOf
) -> None:
    write("a.txt", b"caf\xe9 " * 20)
    manifest = prepared("a.txt", "data.encoding_errors=replace")
    assert BYTES.decode(tokens_of(manifest)) == "caf\ufffd " * 20
    assert manifest.bytes.train + manifest.bytes.val == 20 * len("caf\ufffd ".encode())


def test_the_bytes_do_not_depend_on_workers_or_folder(
    write: Write, tmp_path: Path, prepared: Prepared
) -> None:
    for name in "abc":
        write(f"folder/{name}.jsonl", as_jsonl([f"{name} row {i}" for i in range(100)]))
    write("folder/d.txt", TEXT)
    sets = ["tokenizer.name=char", "data.shard_tokens=500"]
    one = prepared("folder", *sets, workers=1, out=tmp_path / "one")
    two = prepared("folder", *sets, workers=2, out=tmp_path / "two")
    assert one == two
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert len(content(tmp_path / "one")) > 10


def test_an_error_in_a_worker_is_the_same_error(write: Write, refusal: Refusal) -> None:
    write("folder/a.jsonl", as_jsonl(["fine"] * 50))
    write("folder/b.jsonl", as_jsonl(["fine"] * 50) + "broken\n")
    error = refusal("folder", workers=2)
    assert error.message.endswith("b.jsonl: line 51 is not JSON (Expecting value)")
    assert not Path("data").exists()


def test_a_stored_tokenizer_serves_another_text(
    write: Write, tmp_path: Path, prepared: Prepared, refusal: Refusal
) -> None:
    write("a.txt", TEXT)
    write("b.txt", "it's Line 7: na\u00efve")
    prepared("a.txt", "tokenizer.name=char", out=Path("data/a"))
    reuse = "tokenizer.path=data/a/tokenizer.json"
    manifest = prepared("b.txt", reuse)
    assert manifest.tokenizer.sha256 == load_tokenizer(Path("data/a")).fingerprint
    assert prepared("b.txt", reuse) == manifest
    (tmp_path / "other.json").write_bytes(dump_tokenizer(BYTES))
    assert "differs in: tokenizer" in refusal("b.txt", "tokenizer.path=other.json", code=2).message


def test_a_character_the_stored_tokenizer_lacks_names_the_file(
    write: Write, prepared: Prepared, refusal: Refusal
) -> None:
    write("a.txt", "abc" * 50)
    write("b.txt", "abc" * 50 + "Z")
    prepared("a.txt", "tokenizer.name=char", out=Path("data/a"))
    error = refusal("b.txt", "tokenizer.path=data/a")
    assert error.message == "b.txt: the char vocabulary of 3 characters does not have: 'Z' (U+005A)"
    assert not OUT.exists()


def test_progress_adds_up_to_the_bytes_of_text(write: Write, prepared: Prepared) -> None:
    write("folder/a.txt", TEXT)
    write("folder/b.jsonl", as_jsonl([TEXT] * 500))
    done: list[int] = []
    manifest = prepared("folder", on_bytes=lambda kind, n_bytes: done.append(n_bytes))
    assert sum(done) == manifest.bytes.train + manifest.bytes.val
    assert len(done) > 3


@pytest.mark.parametrize("name", ["gpt2", "bytes", "char", "bpe"])
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_nul_bytes_and_empty_documents_are_text(
    write: Write, prepared: Prepared, tokens_of: TokensOf, name: str, suffix: str
) -> None:
    texts = ["a\0b", "", "\0\0\0", "c d e f g h i j k l m n o p", ""]
    if suffix == ".jsonl":
        write("in/all.jsonl", as_jsonl(texts))
    else:
        for index, text in enumerate(texts):
            write(f"in/{index}.txt", text)
    manifest = prepared("in", f"tokenizer.name={name}", "data.val_fraction=0")
    tokenizer = load_tokenizer(OUT)
    tokens = tokens_of(manifest)
    assert manifest.documents == tokens.count(tokenizer.eot) == 5
    assert tokenizer.decode(tokens) == "".join(texts)
    assert manifest.bytes.train == sum(map(len, texts))


def test_a_vocabulary_is_learned_without_the_held_out_tails(
    write: Write, prepared: Prepared
) -> None:
    write("a.txt", "row and row " * 900 + "zzzzzzzz qqqqqqqq " * 60)
    prepared("a.txt", "tokenizer.name=bpe", "tokenizer.vocab_size=400")
    tokenizer = load_tokenizer(OUT)
    learned = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    assert b"row" in learned
    assert not any(b"zz" in token or b"qq" in token for token in learned)


def test_a_vocabulary_is_learned_without_the_held_out_rows(
    write: Write, prepared: Prepared
) -> None:
    rows = [f"row {i}" for i in range(300)]
    held_out = [i for i in range(300) if derive_uniform("split", 1337, 0, i) < 0.1]
    for i in held_out:
        rows[i] = "zzzzzzzz qqqqqqqq " * 20
    write("a.jsonl", as_jsonl(rows))
    prepared("a.jsonl", "tokenizer.name=bpe", "tokenizer.vocab_size=400")
    tokenizer = load_tokenizer(OUT)
    learned = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    assert b"row" in learned
    assert not any(b"zz" in token or b"qq" in token for token in learned)


def test_the_command_reports_what_it_wrote(write: Write, gpt: Any) -> None:
    write("a.txt", TEXT)
    done = gpt("prepare", "a.txt", "--json", "-s", "tokenizer.name=bytes")
    assert done.code == 0
    size = len(TEXT.encode())
    facts = done.json
    assert facts.pop("seconds") >= 0
    n_train = int((size + 1) * 0.9)
    assert facts == {
        "dir": "data/a", "tokenizer": "bytes", "vocab_size": 257, "documents": 1, "shards": 2,
        "tokens": {"train": n_train, "val": size + 1 - n_train},
        "bytes": {"train": n_train - 1, "val": size + 1 - n_train},
    }  # fmt: skip


def test_a_dry_run_writes_nothing(write: Write, gpt: Any, tmp_path: Path) -> None:
    write("a.txt", TEXT)
    done = gpt("prepare", "a.txt", "--json", "--dry-run")
    assert done.code == 0
    assert (done.json["files"], done.json["source_bytes"]) == (1, len(TEXT.encode()))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_failure_is_one_json_object(write: Write, gpt: Any) -> None:
    write("a.txt", gzip.compress(b"x"), raw=True)
    done = gpt("prepare", "a.txt", "--json")
    assert done.code == 3
    assert done.json["exit_code"] == 3
    assert done.json["error"] == "a.txt: not UTF-8 at byte 1"
    assert "encoding_errors" in done.json["hint"]
