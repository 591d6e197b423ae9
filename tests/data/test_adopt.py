"""Token files of other programs, taken as they are."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptcli.data.shards import TokenReader, read_manifest


def llmc(path: Path, ids: list[int]) -> None:
    """Write a shard as llm.c does."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(ids)
    path.write_bytes(header.tobytes() + np.array(ids, dtype="<u2").tobytes())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for token files."""
    path = tmp_path / "tokens"
    path.mkdir()
    return path


def test_shards_of_llmc_are_read_where_they_are(gpt: Any, folder: Path) -> None:
    llmc(folder / "fineweb_train_000002.bin", [50256, 995])
    llmc(folder / "fineweb_train_000001.bin", [50256, 15496, 995])
    llmc(folder / "fineweb_val_000000.bin", [50256, 15496])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    found = gpt("prepare", str(folder), "--json").json
    assert found["dir"] == str(folder) and found["tokens"] == {"train": 5, "val": 2}
    assert found["documents"] == 3
    assert found["bytes"] == {"train": len("Hello world world"), "val": len("Hello")}
    assert all((folder / name).read_bytes() == raw for name, raw in before.items())
    with TokenReader(folder, read_manifest(folder), "train") as tokens:
        assert tokens.read(0, 5).tolist() == [50256, 15496, 995, 50256, 995]
    assert gpt("prepare", str(folder), "--json").json["tokens"] == found["tokens"]
    assert gpt("data", "verify", str(folder)).code == 0


def test_files_of_nanogpt_are_read_where_they_are(gpt: Any, folder: Path, tiny_set: Any) -> None:
    ids = np.random.default_rng(0).integers(0, 257, 3000).astype("<u2")
    ids[:2700].tofile(folder / "train.bin")
    ids[2700:].tofile(folder / "val.bin")
    words = ["-s", "tokenizer.name=bytes"]
    assert gpt("prepare", str(folder), *words).code == 0
    with TokenReader(folder, read_manifest(folder), "val") as tokens:
        assert tokens.read(0, 300).tolist() == ids[2700:].tolist()
    done = gpt("train", *tiny_set, "-s", f"data.dir={folder}")
    assert done.code == 0, done.err


@pytest.mark.parametrize(
    ("name", "content", "words", "code", "part"),
    [
        ("notes_train.bin", b"hello", [], 3, "neither a shard of llm.c's format nor nanoGPT's"),
        ("train.bin", b"odd", [], 3, "neither a shard"),
        ("tokens.bin", b"ab", [], 3, "neither 'train' nor 'val' in its name"),
        ("train.bin", b"\xff\xff", [], 3, "holds id 65,535, but gpt2 has 50,257 ids"),
        ("train.bin", b"ab", ["-s", "tokenizer.name=char"], 2, "tokenizer.path"),
        ("train.bin", b"ab", ["--out", "elsewhere"], 2, "used in place"),
        ("val.bin", b"\x01\x00", [], 3, "no training tokens"),
    ],
)
def test_what_cannot_be_adopted_is_named(
    gpt: Any, folder: Path, name: str, content: bytes, words: list[str], code: int, part: str
) -> None:
    (folder / name).write_bytes(content)
    done = gpt("prepare", str(folder), *words)
    assert done.code == code and part in done.err and len(done.err_lines) <= 3
    assert not (folder / "manifest.json").exists()
