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
    assert "skipped          none" in shown and "trained_tokens" in shown


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
