"""`gpt data`: what is in a folder, decoded windows, hashes checked."""

from pathlib import Path
from typing import Any


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
