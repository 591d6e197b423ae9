"""Folders that hold something already, and what is left when preparing fails: nothing."""

import json
import sys
from pathlib import Path

import pytest

from gptcli.data import shard_writer, shards
from gptcli.errors import DataError
from gptcli.tokenizers import load_tokenizer, tokenizer_from
from support.commands import Gpt
from support.folders import Encoded, Prepared, Refusal, TokensOf, Write, content
from support.texts import as_jsonl

OUT = Path("data/out")
BYTES = tokenizer_from({"name": "bytes"})
TEXT = "".join(
    f"Line {i}: it's na\u00efve \U0001f600\r\n\n    indented  twice, <|endoftext|> {i * 7919}.\n"
    for i in range(60)
)


def test_preparing_twice_leaves_the_folder_as_it_is(write: Write, prepared: Prepared) -> None:
    write("a.txt", TEXT)
    first = prepared("a.txt")
    before = {path.name: path.stat().st_mtime_ns for path in OUT.iterdir()}
    assert prepared("a.txt") == first
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
def test_a_folder_prepared_otherwise_is_refused(
    write: Write, sets: list[str], named: str, prepared: Prepared, refusal: Refusal
) -> None:
    write("a.txt", TEXT)
    prepared("a.txt")
    before = content(OUT)
    error = refusal("a.txt", *sets, code=2)
    assert error.message == f"{OUT} holds other data; it differs in: {named}"
    assert "--force" in (error.hint or "")
    assert content(OUT) == before


def test_a_changed_or_other_source_is_refused(
    write: Write, prepared: Prepared, refusal: Refusal
) -> None:
    write("a.txt", TEXT)
    write("b.txt", TEXT)
    prepared("a.txt")
    assert refusal("b.txt", code=2).message.endswith("differs in: source")
    write("a.txt", TEXT.replace("Line 7", "Line 8"))
    assert refusal("a.txt", code=2).message.endswith("differs in: the source's files")


def test_a_trained_vocabulary_of_another_size_is_refused(
    write: Write, prepared: Prepared, refusal: Refusal
) -> None:
    write("a.txt", TEXT)
    prepared("a.txt", "tokenizer.name=bpe", "tokenizer.vocab_size=300")
    error = refusal("a.txt", "tokenizer.name=bpe", "tokenizer.vocab_size=301", code=2)
    assert error.message.endswith("differs in: max_vocab_size")


def test_force_replaces_only_what_the_manifest_lists(
    write: Write, prepared: Prepared, encoded: Encoded, tokens_of: TokensOf
) -> None:
    write("a.txt", TEXT)
    old = prepared("a.txt", "data.shard_tokens=200")
    mine = {"notes.md": b"mine", "train_000000_099.bin": b"mine too", "my.bin": b""}
    for name, raw in mine.items():
        (OUT / name).write_bytes(raw)
    new = prepared("a.txt", "tokenizer.name=char", force=True)
    listed = {shard.file for split in shards.SPLITS for shard in new.shards(split)}
    assert len(old.shards("train")) > 5 and len(listed) == 2
    assert set(content(OUT)) == listed | set(mine) | {"manifest.json", "tokenizer.json"}
    assert all((OUT / name).read_bytes() == raw for name, raw in mine.items())
    assert tokens_of(new) == encoded(load_tokenizer(OUT), TEXT)


def test_force_on_an_empty_or_new_folder_just_prepares(
    write: Write, tmp_path: Path, prepared: Prepared
) -> None:
    write("a.txt", TEXT)
    new = prepared("a.txt", force=True)
    (tmp_path / "empty").mkdir()
    assert prepared("a.txt", out=tmp_path / "empty", force=True) == new


@pytest.mark.parametrize("name", ["../victim.txt", "..", "", "a\0b", "a" * 300])
def test_force_removes_nothing_outside_the_folder(
    write: Write, prepared: Prepared, refusal: Refusal, name: str
) -> None:
    write("a.txt", TEXT)
    prepared("a.txt")
    victim = write("data/victim.txt", "mine")
    manifest = json.loads((OUT / "manifest.json").read_text())
    manifest["units"][0]["shards"][0]["file"] = name
    del manifest["checksum"]
    (OUT / "manifest.json").write_text(json.dumps(manifest))
    assert "not the name of a file in this folder" in refusal("a.txt", force=True).message
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("make_folder", [False, True])
@pytest.mark.parametrize(
    ("name", "raw", "sets", "problem"),
    [
        ("a.txt", b"text \xff", [], "not UTF-8 at byte 5"),
        ("a.txt", b"", [], "no text in it (1 document)"),
        ("a.txt", b"\xef\xbb\xbf", [], "no text in it (1 document)"),
        ("a.jsonl", b"", [], "no text in it (0 documents)"),
        ("a.jsonl", b'{"text": ""}\n{"text": null}\n', [], "no text in it (2 documents)"),
        ("a.jsonl", b'{"text": "a"}\n' * 50 + b"x", [], "line 51 is not JSON"),
        ("a.jsonl", b'{"text": "a"}\n' * 150, ["data.val_fraction=1e-9"],
         "none of it (150 documents) was assigned to validation (val_fraction 1e-09)"),
        ("a.jsonl", b'{"text": "a"}\n', ["data.val_fraction=0.999999"],
         "all of it (1 document) was assigned to validation"),
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
    refusal: Refusal,
) -> None:
    """Neither shards nor the folders made for them; a folder that was there keeps what it had."""
    monkeypatch.setattr(shard_writer, "_MAX_PARTS", 5)
    write(name, raw)
    if make_folder:
        write(OUT / "mine.txt", "mine")
    error = refusal(name, *sets)
    assert problem.replace("1000", "5") in error.message
    if make_folder:
        assert content(OUT) == {"mine.txt": b"mine"}
    else:
        assert not Path("data").exists()


def test_an_interruption_leaves_nothing(write: Write, prepared: Prepared) -> None:
    write("folder/a.txt", TEXT)
    write("folder/b.jsonl", as_jsonl([TEXT] * 20))

    def interrupt(kind: str, n_bytes: int) -> None:
        assert list(OUT.iterdir())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared("folder", on_bytes=interrupt)
    assert not Path("data").exists()


def test_a_file_that_changes_while_it_is_read_is_refused(write: Write, prepared: Prepared) -> None:
    path = write("a.txt", TEXT)
    error = None
    try:
        prepared("a.txt", on_bytes=lambda *_: path.write_text("other"))
    except DataError as caught:
        error = caught
    assert error is not None and error.message == "a.txt: changed while it was read"
    assert not Path("data").exists()


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
def test_a_full_disk_loses_nothing(
    write: Write, prepared: Prepared, fork_server: Gpt, limit: int, file: str
) -> None:
    """The largest file size allowed stands in for the disk."""
    write("a.txt", "some text")
    done = fork_server(str(limit), code=FULL)
    assert done.code == 5, done.err
    assert f"{file}: File too large" in done.err
    assert 1 <= len(done.err_lines) <= 3
    assert not (OUT / "manifest.json").exists()
    # What is finished is kept; a first unit that is not leaves nothing.
    assert Path("data").exists() == (file == "manifest.json")
    prepared("a.txt")
    prepared("a.txt", out=Path("data/fresh"))
    assert content(OUT) == content(Path("data/fresh"))


def test_what_an_interrupted_run_left_is_written_over(write: Write, prepared: Prepared) -> None:
    write("a.txt", TEXT)
    whole = prepared("a.txt")
    before = content(OUT)
    (OUT / "manifest.json").unlink()
    (OUT / "train_000000_000.bin").write_bytes(b"half")
    (OUT / ".tmp-1-val_000000_000.bin").write_bytes(b"half")
    assert prepared("a.txt") == whole
    assert content(OUT) == before


def test_a_folder_of_another_program_is_refused(write: Write, refusal: Refusal) -> None:
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


def test_a_finished_folder_with_a_missing_shard_is_refused(
    write: Write, prepared: Prepared, refusal: Refusal, encoded: Encoded, tokens_of: TokensOf
) -> None:
    write("a.txt", TEXT)
    prepared("a.txt")
    (OUT / "val_000000_000.bin").unlink()
    error = refusal("a.txt")
    assert "val_000000_000.bin: missing" in error.message
    assert "--force" in (error.hint or "")
    assert tokens_of(prepared("a.txt", force=True)) == encoded(BYTES, TEXT)


def test_a_finished_folder_with_another_tokenizer_is_refused(
    write: Write, prepared: Prepared, refusal: Refusal, encoded: Encoded, tokens_of: TokensOf
) -> None:
    write("a.txt", TEXT)
    prepared("a.txt")
    (OUT / "tokenizer.json").unlink()
    assert "tokenizer.json" in refusal("a.txt").message
    assert tokens_of(prepared("a.txt", force=True)) == encoded(BYTES, TEXT)


def test_a_file_where_the_folder_should_be(write: Write, refusal: Refusal) -> None:
    write("a.txt", TEXT)
    write("data", "a file")
    error = refusal("a.txt", code=5)
    assert "expected a folder, found a file" in error.message


FEW_FILES = """
import resource, sys
from gptcli import cli
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), 4096))
sys.exit(cli.run(["prepare", "a.txt", "--workers", "4", "-s", "tokenizer.name=bytes"]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
@pytest.mark.parametrize("limit", [12, 16])
def test_too_few_open_files_are_a_limit_to_be_raised(
    write: Write, fork_server: Gpt, limit: int
) -> None:
    write("a.txt", "some text")
    done = fork_server(str(limit), code=FEW_FILES)
    assert done.code == 5, done.err
    assert done.err == "error: too many open files\nhint: raise the limit: ulimit -n 4096\n"
    assert not Path("data").exists()
