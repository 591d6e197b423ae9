"""Text to shards: every token in its place, the same bytes every time, no debris of a failure."""

import gzip
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptcli.config import load_config
from gptcli.data import readers, shards, tokenize
from gptcli.data.prepare import make_plan, prepare
from gptcli.data.shards import Manifest, Split
from gptcli.errors import DataError, GptError
from gptcli.keyed import keyed_float
from gptcli.tokenizers import Tokenizer, dump_tokenizer, load_tokenizer, tokenizer_from

Write = Callable[..., Path]

OUT = Path("data/out")
TEXT = "".join(
    f"Line {i}: it's na\u00efve \U0001f600\r\n\n    indented  twice, <|endoftext|> {i * 7919}.\n"
    for i in range(60)
)


def run(source: str, *sets: str, out: Path = OUT, **options: Any) -> Manifest:
    """Prepare a source into a folder."""
    name = [] if any(s.startswith("tokenizer.") for s in sets) else ["tokenizer.name=bytes"]
    flags = {"data.source": source, "data.dir": str(out)}
    return prepare(make_plan(load_config(None, [*name, *sets], flags)), **options)


def refusal(source: str, *sets: str, code: int = 3, **options: Any) -> GptError:
    """Return the error of a source that is refused."""
    with pytest.raises(GptError) as caught:
        run(source, *sets, **options)
    assert caught.value.exit_code == code
    return caught.value


def tokens_of(manifest: Manifest, split: Split, folder: Path = OUT) -> list[int]:
    """Return a split's tokens."""
    with shards.TokenReader(folder, manifest, split) as reader:
        tokens: list[int] = reader.read(0, len(reader)).tolist()
    return tokens


def both(manifest: Manifest, folder: Path = OUT) -> list[int]:
    """Return the tokens of training and validation after each other."""
    return tokens_of(manifest, "train", folder) + tokens_of(manifest, "val", folder)


def encoded(tokenizer: Tokenizer, *texts: str) -> list[int]:
    """Return the tokens of documents, end-of-text before each."""
    return [id for text in texts for id in [tokenizer.eot, *tokenizer.encode(text).tolist()]]


def content(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def as_jsonl(rows: list[str]) -> str:
    """Return rows as lines of JSON."""
    return "".join(json.dumps({"text": row}) + "\n" for row in rows)


BYTES = tokenizer_from({"name": "bytes"})


@pytest.mark.parametrize("name", ["gpt2", "bytes", "char", "bpe"])
@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_train_and_validation_are_the_text(
    write: Write, monkeypatch: pytest.MonkeyPatch, name: str, suffix: str
) -> None:
    """In whatever pieces a file is read, its tokens are those of the whole text."""
    monkeypatch.setattr(readers, "_BLOCK_BYTES", 64)
    monkeypatch.setattr(tokenize, "_SPOOL_BYTES", 100)
    write("a" + suffix, TEXT)
    sets = ["tokenizer.vocab_size=300"] if name == "bpe" else []
    manifest = run("a" + suffix, f"tokenizer.name={name}", *sets, "data.shard_tokens=150")
    tokenizer = load_tokenizer(OUT)
    assert both(manifest) == encoded(tokenizer, TEXT)
    n_tokens = manifest.tokens.train + manifest.tokens.val
    assert manifest.tokens.train == int(n_tokens * 0.9)
    validation = tokens_of(manifest, "val")
    assert manifest.bytes.train + manifest.bytes.val == len(TEXT.encode())
    assert manifest.bytes.val == len(tokenizer.decode_bytes(validation))
    assert TEXT.encode().endswith(tokenizer.decode_bytes(validation))
    listed = {shard.file for split in shards.SPLITS for shard in manifest.shards(split)}
    assert {path.name for path in OUT.iterdir()} == listed | {"manifest.json", "tokenizer.json"}


def test_the_manifest_tells_all(write: Write) -> None:
    write("a.txt", TEXT)
    manifest = run("a.txt", "data.shard_tokens=2000")
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


def test_of_few_files_the_tail_of_each_is_held_out(write: Write) -> None:
    texts = {"a": "alpha " * 50, "b": "", "c": "c", "d": "delta\n" * 30}
    for name, text in texts.items():
        write(f"folder/{name}.txt", text)
    manifest = run("folder", "data.val_fraction=0.25")
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


def test_from_a_hundred_files_whole_files_are_held_out(write: Write) -> None:
    texts = [f"file {i}" for i in range(120)]
    for i, text in enumerate(texts):
        write(f"folder/{i:03d}.txt", text)
    manifest = run("folder")
    split = ["val" if keyed_float("split", 1337, 0, i) < 0.1 else "train" for i in range(120)]
    for name in shards.SPLITS:
        chosen = [text for text, drawn in zip(texts, split, strict=True) if drawn == name]
        assert tokens_of(manifest, name) == encoded(BYTES, *chosen)


def test_rows_are_held_out_whole_and_empty_ones_count(write: Write) -> None:
    rows = [f"row {i}" * (i % 3) for i in range(300)]
    write("rows.jsonl", as_jsonl(rows))
    manifest = run("rows.jsonl", "seed=5", "data.val_fraction=0.2")
    split = ["val" if keyed_float("split", 5, 0, i) < 0.2 else "train" for i in range(300)]
    for name in shards.SPLITS:
        chosen = [row for row, drawn in zip(rows, split, strict=True) if drawn == name]
        assert tokens_of(manifest, name) == encoded(BYTES, *chosen)
        assert manifest.bytes.model_dump()[name] == sum(map(len, chosen))
    assert manifest.documents == 300


def test_text_and_rows_of_a_folder_become_units_of_their_own(write: Write) -> None:
    write("folder/b.txt", "some text " * 20)
    write("folder/a.jsonl", as_jsonl([f"row {i}" for i in range(50)]))
    write("folder/c.csv", "text\n" + "".join(f"cell {i}\n" for i in range(50)))
    manifest = run("folder", "data.val_fraction=0")
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


def test_vocabularies_over_uint16_get_uint32_shards(write: Write) -> None:
    text = "".join(map(chr, range(0x10000, 0x10000 + 65_536)))
    write("a.txt", text)
    manifest = run("a.txt", "tokenizer.name=char", "data.val_fraction=0")
    assert (manifest.dtype, manifest.tokenizer.vocab_size) == ("uint32", 65_537)
    assert both(manifest) == [65_536, *range(65_536)]


def test_no_validation_means_none(write: Write) -> None:
    write("a.txt", TEXT)
    manifest = run("a.txt", "data.val_fraction=0")
    assert manifest.tokens.val == manifest.bytes.val == 0
    assert tokens_of(manifest, "train") == encoded(BYTES, TEXT)
    assert [path.name for path in OUT.glob("val_*")] == []


def test_replaced_bytes_are_counted_as_they_are_written(write: Write) -> None:
    write("a.txt", b"caf\xe9 " * 20)
    manifest = run("a.txt", "data.encoding_errors=replace")
    assert BYTES.decode(both(manifest)) == "caf\ufffd " * 20
    assert manifest.bytes.train + manifest.bytes.val == 20 * len("caf\ufffd ".encode())


def test_the_bytes_do_not_depend_on_workers_or_folder(write: Write, tmp_path: Path) -> None:
    for name in "abc":
        write(f"folder/{name}.jsonl", as_jsonl([f"{name} row {i}" for i in range(100)]))
    write("folder/d.txt", TEXT)
    sets = ["tokenizer.name=char", "data.shard_tokens=500"]
    one = run("folder", *sets, workers=1, out=tmp_path / "one")
    two = run("folder", *sets, workers=2, out=tmp_path / "two")
    assert one == two
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert len(content(tmp_path / "one")) > 10


def test_an_error_in_a_worker_is_the_same_error(write: Write) -> None:
    write("folder/a.jsonl", as_jsonl(["fine"] * 50))
    write("folder/b.jsonl", as_jsonl(["fine"] * 50) + "broken\n")
    error = refusal("folder", workers=2)
    assert error.message.endswith("b.jsonl: line 51 is not JSON (Expecting value)")
    assert not Path("data").exists()


def test_preparing_twice_leaves_the_folder_as_it_is(write: Write) -> None:
    write("a.txt", TEXT)
    first = run("a.txt")
    before = {path.name: path.stat().st_mtime_ns for path in OUT.iterdir()}
    assert run("a.txt") == first
    assert {path.name: path.stat().st_mtime_ns for path in OUT.iterdir()} == before


@pytest.mark.parametrize(
    ("sets", "named"),
    [
        (["tokenizer.name=char"], "tokenizer (bytes there, char here)"),
        (["data.val_fraction=0.2"], "val_fraction"),
        (["data.shard_tokens=100"], "shard_tokens"),
        (["data.encoding_errors=replace"], "encoding_errors"),
        (["data.text_field=body"], "text_field"),
        (["seed=1"], "seed"),
        (["seed=1", "data.val_fraction=0"], "val_fraction, seed"),
    ],
)
def test_a_folder_prepared_otherwise_is_refused(write: Write, sets: list[str], named: str) -> None:
    write("a.txt", TEXT)
    run("a.txt")
    before = content(OUT)
    error = refusal("a.txt", *sets, code=2)
    assert error.message == f"{OUT} holds other data; it differs in: {named}"
    assert "--force" in (error.hint or "")
    assert content(OUT) == before


def test_a_changed_or_other_source_is_refused(write: Write) -> None:
    write("a.txt", TEXT)
    write("b.txt", TEXT)
    run("a.txt")
    assert refusal("b.txt", code=2).message.endswith("differs in: source")
    write("a.txt", TEXT.replace("Line 7", "Line 8"))
    assert refusal("a.txt", code=2).message.endswith("differs in: the source's files")


def test_a_trained_vocabulary_of_another_size_is_refused(write: Write) -> None:
    write("a.txt", TEXT)
    run("a.txt", "tokenizer.name=bpe", "tokenizer.vocab_size=300")
    error = refusal("a.txt", "tokenizer.name=bpe", "tokenizer.vocab_size=301", code=2)
    assert error.message.endswith("differs in: max_vocab_size")


def test_a_stored_tokenizer_serves_another_text(write: Write, tmp_path: Path) -> None:
    write("a.txt", TEXT)
    write("b.txt", "it's Line 7: na\u00efve")
    run("a.txt", "tokenizer.name=char", out=Path("data/a"))
    reuse = "tokenizer.path=data/a/tokenizer.json"
    manifest = run("b.txt", reuse)
    assert manifest.tokenizer.sha256 == load_tokenizer(Path("data/a")).fingerprint
    assert run("b.txt", reuse) == manifest
    (tmp_path / "other.json").write_bytes(dump_tokenizer(BYTES))
    assert "differs in: tokenizer" in refusal("b.txt", "tokenizer.path=other.json", code=2).message


def test_a_character_the_stored_tokenizer_lacks_names_the_file(write: Write) -> None:
    write("a.txt", "abc" * 50)
    write("b.txt", "abc" * 50 + "Z")
    run("a.txt", "tokenizer.name=char", out=Path("data/a"))
    error = refusal("b.txt", "tokenizer.path=data/a")
    assert error.message == "b.txt: the char vocabulary of 3 characters does not have: 'Z' (U+005A)"
    assert not OUT.exists()


def test_force_replaces_only_what_the_manifest_lists(write: Write) -> None:
    write("a.txt", TEXT)
    old = run("a.txt", "data.shard_tokens=200")
    mine = {"notes.md": b"mine", "train_000000_099.bin": b"mine too", "my.bin": b""}
    for name, raw in mine.items():
        (OUT / name).write_bytes(raw)
    new = run("a.txt", "tokenizer.name=char", force=True)
    listed = {shard.file for split in shards.SPLITS for shard in new.shards(split)}
    assert len(old.shards("train")) > 5 and len(listed) == 2
    assert set(content(OUT)) == listed | set(mine) | {"manifest.json", "tokenizer.json"}
    assert all((OUT / name).read_bytes() == raw for name, raw in mine.items())
    assert both(new) == encoded(load_tokenizer(OUT), TEXT)


def test_force_on_an_empty_or_new_folder_just_prepares(write: Write, tmp_path: Path) -> None:
    write("a.txt", TEXT)
    new = run("a.txt", force=True)
    (tmp_path / "empty").mkdir()
    assert run("a.txt", out=tmp_path / "empty", force=True) == new


def test_force_removes_nothing_outside_the_folder(write: Write) -> None:
    write("a.txt", TEXT)
    run("a.txt")
    victim = write("data/victim.txt", "mine")
    manifest = json.loads((OUT / "manifest.json").read_text())
    manifest["units"][0]["shards"][0]["file"] = "../victim.txt"
    (OUT / "manifest.json").write_text(json.dumps(manifest))
    assert "lists a file outside the folder" in refusal("a.txt", force=True).message
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("make_folder", [False, True])
@pytest.mark.parametrize(
    ("name", "raw", "sets", "problem"),
    [
        ("a.txt", b"text \xff", [], "not UTF-8 at byte 5"),
        ("a.txt", b"", [], "no text in it (1 documents)"),
        ("a.txt", b"\xef\xbb\xbf", [], "no text in it (1 documents)"),
        ("a.jsonl", b"", [], "no text in it (0 documents)"),
        ("a.jsonl", b'{"text": ""}\n{"text": null}\n', [], "no text in it (2 documents)"),
        ("a.jsonl", b'{"text": "a"}\n' * 50 + b"x", [], "line 51 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n', ["data.val_fraction=1e-9"],
         "none of its 1 documents fell to validation (val_fraction 1e-09)"),
        ("a.jsonl", b'{"text": "a"}\n', ["data.val_fraction=0.999999"],
         "all of its 1 documents fell to validation"),
        ("a.jsonl", b'{"body": "a"}\n', [], "no field 'text'; the fields are: body"),
        ("a.txt", b"abc" * 1000, ["data.shard_tokens=1", "tokenizer.name=char"],
         "more than 1000 shards"),
    ],
)  # fmt: skip
def test_nothing_is_left_of_a_failure(
    write: Write,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    raw: bytes,
    sets: list[str],
    problem: str,
    make_folder: bool,
) -> None:
    """Neither shards nor the folders made for them; a folder that was there keeps what it had."""
    monkeypatch.setattr(shards, "_MOST_PARTS", 5)
    write(name, raw)
    if make_folder:
        write(OUT / "mine.txt", "mine")
    error = refusal(name, *sets)
    assert problem.replace("1000", "5") in error.message
    if make_folder:
        assert content(OUT) == {"mine.txt": b"mine"}
    else:
        assert not Path("data").exists()


def test_an_interruption_leaves_nothing(write: Write) -> None:
    write("folder/a.txt", TEXT)
    write("folder/b.jsonl", as_jsonl([TEXT] * 20))

    def interrupt(n_bytes: int) -> None:
        assert list(OUT.iterdir())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("folder", on_progress=interrupt)
    assert not Path("data").exists()


def test_a_file_that_changes_while_it_is_read_is_refused(write: Write) -> None:
    path = write("a.txt", TEXT)
    error = None
    try:
        run("a.txt", on_progress=lambda n_bytes: path.write_text("other"))
    except DataError as caught:
        error = caught
    assert error is not None and error.message == "a.txt: changed while it was read"
    assert not Path("data").exists()


def test_progress_adds_up_to_the_bytes_of_text(write: Write) -> None:
    write("folder/a.txt", TEXT)
    write("folder/b.jsonl", as_jsonl([TEXT] * 200))
    done: list[int] = []
    manifest = run("folder", on_progress=done.append)
    assert sum(done) == manifest.bytes.train + manifest.bytes.val
    assert len(done) > 3


FULL = """
import resource, sys
from gptcli import cli
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
sys.exit(cli.run(["prepare", "a.txt", "--out", "data/out", "-s", "tokenizer.name=bytes"]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
@pytest.mark.parametrize(
    ("limit", "file"), [(1030, "train_000000_000.bin"), (1100, "manifest.json")]
)
def test_a_full_disk_leaves_nothing(write: Write, limit: int, file: str) -> None:
    """The largest file size allowed stands in for the disk."""
    write("a.txt", "some text")
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(limit)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 5, done.stderr
    assert f"{file}: File too large" in done.stderr
    assert 1 <= len(done.stderr.splitlines()) <= 3
    assert not Path("data").exists()


def test_what_an_interrupted_run_left_is_written_over(write: Write) -> None:
    write("a.txt", TEXT)
    whole = run("a.txt")
    before = content(OUT)
    (OUT / "manifest.json").unlink()
    (OUT / "train_000000_000.bin").write_bytes(b"half")
    (OUT / ".tmp-1-val_000000_000.bin").write_bytes(b"half")
    assert run("a.txt") == whole
    assert content(OUT) == before


def test_a_folder_of_another_program_is_refused(write: Write) -> None:
    write("a.txt", TEXT)
    write(OUT / "tokenizer.json", '{"version": "1.0", "model": {}}')
    assert "holds files of another program" in refusal("a.txt", code=2).message
    assert "holds files of another program" in refusal("a.txt", code=2, force=True).message
    (OUT / "tokenizer.json").unlink()
    write(OUT / "manifest.json", '{"name": "my web app"}')
    for force in (False, True):
        error = refusal("a.txt", force=force)
        assert "damaged manifest" in error.message
        assert "move the folder away" in (error.hint or "")
    assert content(OUT) == {"manifest.json": b'{"name": "my web app"}'}


def test_a_finished_folder_with_a_missing_shard_is_refused(write: Write) -> None:
    write("a.txt", TEXT)
    run("a.txt")
    (OUT / "val_000000_000.bin").unlink()
    error = refusal("a.txt")
    assert "val_000000_000.bin: missing" in error.message
    assert "--force" in (error.hint or "")
    assert both(run("a.txt", force=True)) == encoded(BYTES, TEXT)


def test_a_finished_folder_with_another_tokenizer_is_refused(write: Write) -> None:
    write("a.txt", TEXT)
    run("a.txt")
    (OUT / "tokenizer.json").unlink()
    assert "tokenizer.json" in refusal("a.txt").message
    assert both(run("a.txt", force=True)) == encoded(BYTES, TEXT)


def test_a_file_where_the_folder_should_be(write: Write) -> None:
    write("a.txt", TEXT)
    write("data", "a file")
    error = refusal("a.txt", code=5)
    assert "a file stands where a folder is needed" in error.message


def test_a_vocabulary_is_learned_without_the_held_out_rows(write: Write) -> None:
    rows = [f"row {i}" for i in range(300)]
    held_out = [i for i in range(300) if keyed_float("split", 1337, 0, i) < 0.1]
    for i in held_out:
        rows[i] = "zzzzzzzz qqqqqqqq " * 20
    write("a.jsonl", as_jsonl(rows))
    run("a.jsonl", "tokenizer.name=bpe", "tokenizer.vocab_size=400")
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
