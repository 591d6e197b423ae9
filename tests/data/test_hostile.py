"""Folders, files and tokenizers that nobody made in good faith: an error of the data, no crash."""

import base64
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptcli.data import readers
from gptcli.data.shards import read_manifest
from gptcli.errors import DataError
from gptcli.tokenizers import bpe
from support.folders import Prepared, Refusal, Write

OUT = Path("data/out")
SHARD = ("units", 0, "shards", 0)
VOCABULARY = ("recipe", "tokenizer", "vocab_size")
AGAIN = ("prepare", "a.txt", "-s", "tokenizer.name=bytes", "--out", str(OUT))
COMMANDS = (("data", "info", str(OUT)), ("data", "peek", str(OUT)), ("data", "verify", str(OUT)),
            AGAIN, (*AGAIN, "--force"))  # fmt: skip


@pytest.mark.parametrize(
    ("place", "value"),
    [
        *(((*SHARD, "file"), name)
          for name in ("a\0b", "..", ".", "", "x" * 300, "../a.txt", "/etc/x", "\ud800")),
        *(((*SHARD, "tokens"), count) for count in (0, -1, 2**40, 2**63, 10**30)),
        *((("tokens", "train"), count) for count in (0, -1, 2**63, 10**30)),
        *(((*VOCABULARY,), size) for size in (0, -1, 2**63, 10**30)),
        (("documents",), 2**63),
        (("units",), []),
        (("recipe", "val_fraction"), float("nan")),
    ],
)  # fmt: skip
def test_a_manifest_of_the_impossible_is_refused_by_every_command(
    gpt: Any, write: Write, prepared: Prepared, place: tuple[str | int, ...], value: object
) -> None:
    write("a.txt", "some text\n" * 40)
    prepared("a.txt")
    content = json.loads((OUT / "manifest.json").read_text())
    del content["checksum"]
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (OUT / "manifest.json").write_text(json.dumps(content))
    before = {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}
    for words in COMMANDS:
        done = gpt(*words)
        assert done.code == 3 and "damaged manifest" in done.err, done.err
        assert len(done.err_lines) <= 3
    assert {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("raw", ["[" * 100_000, '{"a":' * 100_000, "9" * 9000, "\0", "[]", "{}"])
def test_a_manifest_of_another_shape_is_refused(gpt: Any, write: Write, raw: str) -> None:
    write("a.txt", "text")
    write(OUT / "manifest.json", raw)
    for words in COMMANDS:
        done = gpt(*words)
        assert done.code == 3 and "damaged manifest" in done.err, done.err


@pytest.mark.parametrize("size", [1, 300])
def test_a_vocabulary_that_is_not_the_tokenizers_is_refused(
    gpt: Any, write: Write, prepared: Prepared, size: int
) -> None:
    write("a.txt", "some text\n" * 40)
    prepared("a.txt")
    content = json.loads((OUT / "manifest.json").read_text())
    del content["checksum"]
    content["recipe"]["tokenizer"]["vocab_size"] = size
    (OUT / "manifest.json").write_text(json.dumps(content))
    for words in COMMANDS[1:4]:
        assert gpt(*words).code == 3
    assert gpt(*COMMANDS[4]).code == 0


def test_ids_outside_the_vocabulary_are_not_decoded(
    gpt: Any, write: Write, prepared: Prepared
) -> None:
    write("a.txt", "some text\n" * 40)
    prepared("a.txt")
    [shard] = read_manifest(OUT).shards("train")
    raw = np.fromfile(OUT / shard.file, dtype="<u2")
    raw[512:] = 60000
    raw.tofile(OUT / shard.file)
    done = gpt("data", "peek", str(OUT))
    assert done.code == 3
    assert "the train split holds id 60000, the vocabulary has 257" in done.err


def test_an_adopted_folder_whose_manifest_is_empty_has_nothing_to_train_on(gpt: Any) -> None:
    Path("tokens").mkdir()
    np.arange(200, dtype="<u2").tofile("tokens/train.bin")
    assert gpt("prepare", "./tokens", "-s", "tokenizer.name=bytes").code == 0
    path = Path("tokens/manifest.json")
    content = json.loads(path.read_text())
    del content["checksum"]
    content |= {"units": [], "tokens": {"train": 0, "val": 0}}
    path.write_text(json.dumps(content))
    done = gpt("prepare", "./tokens", "-s", "tokenizer.name=bytes")
    assert done.code == 0 and "too short to train on" in done.err and "next:" not in done.err


def test_two_columns_of_one_name_are_refused(refusal: Refusal) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, "a.parquet")
    assert refusal("a.parquet").message == "a.parquet: 2 fields are named 'text'"


def test_a_csv_field_without_an_end_is_refused(
    write: Write, monkeypatch: pytest.MonkeyPatch, refusal: Refusal
) -> None:
    monkeypatch.setattr(readers, "_MAX_FIELD_CHARS", 1000)
    write("a.csv", 'text\nfine\n"' + "no end\n" * 500)
    error = refusal("a.csv")
    assert error.message.startswith("a.csv: line 14") and "field limit (1000)" in error.message
    assert error.hint == "look for a quotation mark that is never closed"


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names there are text")
@pytest.mark.parametrize("name", [b"a\xff.txt", b"a\xff.jsonl"])
def test_a_file_name_that_is_not_text_is_shown_as_well_as_can_be(gpt: Any, name: bytes) -> None:
    Path("texts").mkdir()
    path = b"texts/" + name
    Path(os.fsdecode(path)).write_bytes(b'{"text": "some words"}\n' * 9)
    assert gpt("prepare", "texts").code == 0
    assert gpt("prepare", "texts").code == 0
    [unit] = read_manifest(Path("data/texts")).units
    assert unit.name == path.decode("utf-8", "replace")


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_a_loop_of_links_is_no_source(gpt: Any) -> None:
    Path("loop.txt").symlink_to("loop.txt")
    Path("texts").mkdir()
    Path("texts/loop.txt").symlink_to("loop.txt")
    Path("texts/a.txt").write_text("some words")
    done = gpt("prepare", "loop.txt")
    assert done.code == 3 and "loop.txt" in done.err and "written" not in done.err
    assert gpt("prepare", "texts").code == 0
    for name, where in (("loop", "loop"), ("broken", "nowhere")):
        Path(name).symlink_to(where)
        done = gpt("prepare", name)
        assert done.code == 3 and f"{name}: a link that leads to no file or folder" in done.err


@pytest.mark.parametrize("command", ["prepare", "train"])
def test_a_source_with_a_name_that_no_file_can_have(gpt: Any, command: str) -> None:
    for name in ("x" * 300 + ".txt", "x" * 300, "a/" + "y" * 300):
        words = [command, name] if command == "prepare" else [command, "-s", f"data.source={name}"]
        done = gpt(*words)
        assert done.code in (2, 3) and len(done.err_lines) <= 3, done.err


RANKS = "\n".join(f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256))
BPE = {"name": "bpe", "pattern": r"\s+|\S+", "ranks": RANKS, "specials": {"<|endoftext|>": 256}}


@pytest.mark.parametrize(
    "definition",
    [
        BPE | {"pattern": ""},
        BPE | {"pattern": "("},
        BPE | {"pattern": "\ud800"},
        BPE | {"ranks": RANKS + "\naGU= 3"},
        BPE | {"ranks": RANKS + "\naGU= 256\naGU= 257"},
        BPE | {"ranks": RANKS + "\naGU= " + "9" * 30},
        BPE | {"specials": {}},
        BPE | {"specials": [["<|endoftext|>", 256]]},
        BPE | {"specials": {"<|endoftext|>": 256, "\ud800": 257}},
        BPE | {"name": "\ud800"},
        BPE | {"name": "x" * 1000},
        BPE | {"name": ["x"]},
        {"name": "char", "alphabet": [1, 2, 3]},
        {"name": "char", "alphabet": ["a", "b"]},
        {"name": "char", "alphabet": 3},
        {"name": "char", "alphabet": "\ud800"},
    ],
)
def test_a_tokenizer_file_of_the_impossible_is_refused(
    gpt: Any, definition: dict[str, Any]
) -> None:
    Path("a.txt").write_text("some words\n" * 9)
    header = {"format": "gptcli-tokenizer", "version": 1}
    Path("t.json").write_text(json.dumps(header | definition))
    done = gpt("prepare", "a.txt", "-s", "tokenizer.path=t.json")
    assert done.code in (2, 3) and len(done.err_lines) <= 3, done.err
    assert not Path("data").exists()


def test_a_panic_of_the_library_below_is_an_error_of_the_tokenizer() -> None:
    made = bpe.BpeTokenizer("bpe", "a*", bpe.gpt2().ranks, {bpe.END_OF_TEXT: 50256})
    with pytest.raises(DataError, match="the 'bpe' tokenizer fails: range end index"):
        made.encode("bcd")


@pytest.mark.parametrize(
    ("pattern", "says"), [("a*", "the 'bpe' tokenizer fails"), ("a", "leaves out parts of a text")]
)
def test_a_pattern_that_fails_or_leaves_out_text_is_refused_in_a_line(
    gpt: Any, pattern: str, says: str
) -> None:
    Path("a.txt").write_text("some words\n" * 9)
    header = {"format": "gptcli-tokenizer", "version": 1}
    Path("t.json").write_text(json.dumps(header | BPE | {"pattern": pattern}))
    done = gpt("prepare", "a.txt", "-s", "tokenizer.path=t.json")
    assert done.code == 3 and done.err.startswith("error: t.json: ") and says in done.err, done.err


def test_a_token_of_ten_megabytes_is_a_token(write: Write) -> None:
    token = base64.b64encode(b"a" * 10_000_000).decode()
    specials = {"<|endoftext|>": 257}
    made = bpe.from_definition(BPE | {"ranks": f"{RANKS}\n{token} 256", "specials": specials})
    assert made.token_bytes(256) == b"a" * 10_000_000


def test_more_ids_than_memory_can_hold_are_not_made_room_for() -> None:
    assert bpe.train_bpe(["some words " * 20], 10**15).vocab_size < 300


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that fails")
def test_a_text_that_cannot_be_read_to_its_end_is_named(gpt: Any) -> None:
    """The first page of a process is nobody's: the system calls that an input/output error."""
    for words in (("prepare", "/proc/self/mem"), ("train", "-s", "data.source=/proc/self/mem")):
        done = gpt(*words, "-s", "tokenizer.name=bytes", "-s", "data.dir=out")
        assert done.code == 3 and "/proc/self/mem: Input/output error" in done.err


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pipe")
def test_nobody_waits_for_a_pipe_that_should_be_a_vocabulary(gpt: Any) -> None:
    Path("a.txt").write_text("some words\n" * 9)
    os.mkfifo("pipe.txt")
    done = gpt("prepare", "a.txt", "-s", "tokenizer.name=char", "-s", "tokenizer.path=pipe.txt")
    assert done.code == 3 and "pipe.txt: not a regular file" in done.err
