"""`gpt data`: what is in a folder, decoded windows, hashes checked."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest


def test_info_says_what_the_folder_holds(gpt: Any, data: Path) -> None:
    found = gpt("data", "info", str(data), "--json").json
    assert found["tokenizer"] == "bytes" and found["vocab_size"] == 257 and found["shards"] == 2
    assert found["tokens"]["train"] + found["tokens"]["val"] == sum(found["bytes"].values()) + 1
    assert "tokenizer        bytes" in gpt("data", "info", str(data)).out


def test_peek_shows_windows_of_the_text(gpt: Any, data: Path, corpus: Path) -> None:
    found = gpt("data", "peek", str(data), "--count", "4", "--seq-len", "40", "--json").json
    text = corpus.read_text()
    assert len(found["windows"]) == 4
    for window in found["windows"]:
        plain = window["text"].replace("<|endoftext|>", "")
        assert plain in text and len(plain) in (39, 40)
    assert gpt("data", "peek", str(data), "--seq-len", "99999").code == 3


def test_peek_shows_borders_and_what_windows_are_of(gpt: Any) -> None:
    Path("texts").mkdir()
    for name in "ab":
        Path(f"texts/{name}.jsonl").write_text(json.dumps({"text": f"{name} " * 40}) + "\n")
    args = ("-s", "tokenizer.name=bytes", "-s", "data.val_fraction=0")
    assert gpt("prepare", "./texts", "--out", "d", *args).code == 0
    found = gpt("data", "peek", "d", "--seq-len", "162", "--count", "1", "--json").json
    [window] = found["windows"]
    assert window["borders"] == [0, 81]
    assert window["units"] == [f"texts/{name}.jsonl" for name in "ab"]
    shown = gpt("data", "peek", "d", "--seq-len", "162", "--count", "1").out
    assert shown.startswith(
        "--- train tokens 0 to 162, from texts/a.jsonl, texts/b.jsonl\n\n<|endoftext|>\na a "
    )
    assert "a \n<|endoftext|>\nb " in shown


def test_info_counts_documents_tokens_and_characters(gpt: Any) -> None:
    rows = ["one two", "one two", "three"] * 40
    Path("a.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    assert gpt("prepare", "a.jsonl", "--out", "d", "-s", "tokenizer.name=bytes").code == 0
    found = gpt("data", "info", "d", "--full", "--json").json
    assert found["contents"]["copies"] == 118 and found["contents"]["longest"] == 7
    shown = gpt("data", "info", "d", "--full").out
    assert "118 of 120 documents equal an earlier one" in shown
    assert "Latin letters" in shown and "7 tokens in the middle" in shown
    assert "contents" not in gpt("data", "info", "d", "--json").json


def test_report_is_a_page_of_the_folder(gpt: Any, data: Path) -> None:
    done = gpt("data", "report", str(data))
    assert done.code == 0 and done.out.startswith(f"{data}/report.html: "), done.err
    page = Path(data, "report.html").read_text(encoding="utf-8")
    assert "<script" not in page and "script-src 'none'" in page
    found = gpt("data", "report", str(data), "-o", "a.html", "--max-tokens", "999", "--json").json
    assert found["file"] == "a.html" and found["contents"]["tokens_read"] < 2000
    assert "Counted in 1," in Path("a.html").read_text()
    assert gpt("data", "verify", str(data)).code == 0  # a page among the shards is no harm
    refused = gpt("data", "report", str(data), "-o", "a.txt")
    assert refused.code == 2 and len(refused.err_lines) <= 3


def test_verify_finds_a_flipped_bit(gpt: Any, data: Path) -> None:
    assert gpt("data", "verify", str(data)).out == "data/tiny: 2 shards match the manifest\n"
    shard = data / "train_000000_000.bin"
    raw = bytearray(shard.read_bytes())
    raw[2000] ^= 4
    shard.write_bytes(raw)
    done = gpt("data", "verify", str(data))
    assert done.code == 3 and len(done.err_lines) <= 3
    assert "train_000000_000.bin: content does not have the hash" in done.err
    shard.unlink()
    assert "missing" in gpt("data", "verify", str(data)).err


@pytest.fixture
def talks(gpt: Any, tmp_path: Path) -> str:
    """A prepared folder of 30 conversations."""
    rows = ({"prompt": f"What is {i}?", "completion": f"{i}, \N{SNOWMAN}"} for i in range(30))
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = gpt("prepare", "talks.jsonl", "--out", "talks", "-s", "tokenizer.name=bytes")
    assert done.code == 0, done.err
    assert "talks: 30 conversations" in done.out and "of them answers)" in done.out
    return "talks"


def test_info_counts_what_is_trained_on(gpt: Any, talks: str) -> None:
    found = gpt("data", "info", talks, "--json").json
    assert (found["conversation_format"], found["bad_rows"]) == ("prompt", "refuse")
    assert found["skipped"] == {}
    n_trained = sum(len(f"{i}, \N{SNOWMAN}".encode()) + 1 for i in range(30))
    assert sum(found["trained_tokens"].values()) == n_trained
    shown = gpt("data", "info", talks).out
    assert "\nskipped             none\n" in shown and "trained_tokens" in shown


def test_skipped_rows_are_named(gpt: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {i}?", "completion": "it" * (i != 7)} for i in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    refused = gpt("prepare", "a.jsonl", "--out", "a")
    assert refused.code == 3 and len(refused.err_lines) <= 3
    assert "a.jsonl: line 8: empty turn (turn 2)" in refused.err
    done = gpt("prepare", "a.jsonl", "--out", "a", "-s", "data.bad_rows=skip")
    assert "warning: skipped 1 row: empty turn (first: a.jsonl: line 8)" in done.err
    assert "1 row: empty turn (first: a.jsonl: line 8)" in gpt("data", "info", "a").out
    found = gpt("data", "info", "a", "--json").json
    assert found["skipped"] == {"empty turn": {"rows": 1, "first": "a.jsonl: line 8"}}


def test_peek_marks_what_is_trained_on(gpt: Any, talks: str) -> None:
    shown = gpt("data", "peek", talks, "--count", "1").out
    assert re.fullmatch(
        r"--- train conversation \d+\n"
        r"<\|im_start\|>user\nWhat is (\d+)\?<\|im_end\|>\n"
        r"<\|im_start\|>assistant\n\{\+\1, ☃<\|im_end\|>\+\}\n\n",
        shown,
    )
    [talk] = gpt("data", "peek", talks, "--count", "1", "--json").json["conversations"]
    trained = [part["text"] for part in talk["parts"] if part["trained"]]
    assert len(trained) == 1 and trained[0].endswith(", \N{SNOWMAN}<|im_end|>")
    cut = gpt("data", "peek", talks, "--count", "1", "--seq-len", "4").out
    assert re.search(r"more tokens\)", cut)


def test_peek_colors_what_is_trained_on(
    gpt: Any, talks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    colored = gpt("data", "peek", talks, "--count", "1").out
    assert "\x1b[1;32m" in colored and "{+" not in colored
    monkeypatch.setenv("NO_COLOR", "1")
    plain = gpt("data", "peek", talks, "--count", "1").out
    assert "\x1b" not in plain and "{+" in plain


@pytest.mark.parametrize("suffix", ["mask", "starts"])
def test_verify_finds_a_flipped_bit_beside_a_shard(gpt: Any, talks: str, suffix: str) -> None:
    assert gpt("data", "verify", talks).out == "talks: 2 shards match the manifest\n"
    path = Path(talks, f"train_000000_000.{suffix}")
    raw = bytearray(path.read_bytes())
    raw[9] ^= 4
    path.write_bytes(raw)
    done = gpt("data", "verify", talks)
    assert done.code == 3 and len(done.err_lines) <= 3
    assert f"train_000000_000.{suffix}: content does not have the hash" in done.err
    path.write_bytes(raw[:-1])
    assert f"train_000000_000.{suffix}: {len(raw) - 1} bytes" in gpt("data", "verify", talks).err
    path.unlink()
    assert "missing" in gpt("data", "verify", talks).err


@pytest.mark.parametrize("kind", ["all", "none"])
def test_verify_refuses_a_mask_of_one_kind(gpt: Any, talks: str, kind: str) -> None:
    """Also where hashes and counts say that it was written so."""
    folder, content = Path(talks), json.loads(Path(talks, "manifest.json").read_text())
    for shard in content["units"][0]["shards"]:
        bits = np.full(shard["tokens"], kind == "all")
        raw = np.packbits(bits, bitorder="little").tobytes()
        (folder / shard["file"]).with_suffix(".mask").write_bytes(raw)
        shard["mask_sha256"] = hashlib.sha256(raw).hexdigest()
        shard["trained"] = int(bits.sum())
    del content["checksum"]
    (folder / "manifest.json").write_text(json.dumps(content))
    done = gpt("data", "verify", talks)
    assert done.code == 3 and len(done.err_lines) <= 3
    assert f"{kind} of the" in done.err and "tokens are trained on" in done.err


def test_overlap_of_a_folder_and_a_text(gpt: Any, data: Path, corpus: Path) -> None:
    lines = corpus.read_text().splitlines()
    own = " ".join(f"word{i}" for i in range(30))
    Path("b.txt").write_text("\n".join([own, *lines[20:24], "the end"]))
    shown = gpt("data", "overlap", str(data), "b.txt")
    assert shown.code == 0, shown.err
    first, *shares = shown.out.splitlines()[:4]
    assert first == f"b.txt: 64 words, of which {data} has"
    assert [line.split(" of ", 1)[1] for line in shares] == [
        "6 lines", "52 spans of 13 words", "15 spans of 50 words",
    ]  # fmt: skip
    assert "--- the longest common span: 32 words\n" in shown.out
    assert "--- 32 words from word 30 on\n" in shown.out
    found = gpt("data", "overlap", str(data), "b.txt", "--json").json
    assert (found["unit"], found["units"], found["longest"]["start"]) == ("word", 64, 30)
    assert found["lines"] == {"total": 6, "found": 4}
    assert found["spans"]["13"] == {"total": 52, "found": 20} and found["questions"] is None


def test_overlap_of_a_folder_with_itself_is_of_its_validation_text(gpt: Any, data: Path) -> None:
    found = gpt("data", "overlap", str(data), str(data), "--json").json
    assert found["unit"] == "token" and found["spans"]["50"]["found"] < 20
    found = gpt("data", "overlap", str(data), str(data), "--split", "train", "--json").json
    assert all(share["found"] == share["total"] for share in found["spans"].values())


def test_overlap_finds_questions_of_a_test(gpt: Any, data: Path, corpus: Path) -> None:
    seen = " ".join(corpus.read_text().split()[40:60])
    rows = [{"prompt": seen, "answer": "yes"}, {"prompt": "Who\x1b sat where?", "answer": "I"}]
    Path("test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = gpt("data", "overlap", str(data), "test.jsonl", "--json").json
    assert found["questions"] == {"total": 2, "found": 1} and found["questions_found"] == [0]
    shown = gpt("data", "overlap", str(data), "test.jsonl").out
    assert "  50.00% of 2 questions (at least 13 words in a row; a shorter one whole)\n" in shown
    assert f"--- question 1\n{seen}\n" in shown


def test_overlap_refuses_what_it_cannot_read(gpt: Any, data: Path) -> None:
    Path("b.jsonl").write_text('{"body": "one two"}\n')
    Path("empty.txt").write_text("\n")
    Path("folder").mkdir()
    for name, why in {
        "b.jsonl": "no field 'text'; the fields are: body",
        "empty.txt": "empty.txt: no text to compare",
        "folder": "not prepared",
        "none.txt": "none.txt",
    }.items():
        done = gpt("data", "overlap", str(data), name)
        assert done.code == 3 and why in done.err and len(done.err_lines) <= 3, done.err
    Path("chat.jsonl").write_text('{"messages": [{"role": "user", "content": "Hello"}]}\n')
    for pair in ((str(data), "chat.jsonl"), ("chat.jsonl", str(data))):
        done = gpt("data", "overlap", *pair)
        assert done.code == 3 and "`gpt prepare chat.jsonl`" in done.err, done.err
    done = gpt("data", "overlap", str(data), "b.jsonl", "-s", "data.text_field=body")
    assert done.code == 0 and "b.jsonl: 2 words" in done.out
