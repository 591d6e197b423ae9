"""Shards byte for byte, reading across them, and folders that are not what they seem."""

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptcli.data import shards
from gptcli.data.shard_writer import ShardWriter
from gptcli.data.shards import (
    Counts,
    Dtype,
    Manifest,
    Recipe,
    Shard,
    Split,
    TokenizerRecord,
    TokenReader,
    UnitRecord,
)
from gptcli.errors import DataError
from gptcli.tokenizers import dtype_for, dump_tokenizer, tokenizer_from

BYTES = tokenizer_from({"name": "bytes"})


def write_shards(
    folder: Path, tokens: list[int], dtype: Dtype, shard_tokens: int, split: Split = "train"
) -> list[Shard]:
    """Write tokens as the shards of unit 3."""
    with ShardWriter(folder, split, 3, dtype, shard_tokens) as writer:
        for start in range(0, len(tokens), 7):
            writer.append(np.array(tokens[start : start + 7], dtype=np.uint32))
    return writer.shards


def manifest_of(*listed: Shard, dtype: Dtype = "uint16") -> Manifest:
    """Return a manifest that lists shards."""
    record = TokenizerRecord(name="bytes", vocab_size=257, sha256=BYTES.fingerprint)
    recipe = Recipe(
        source="x", revision=None, text_field="text", encoding_errors="strict", val_fraction=0.1,
        seed=1, shard_tokens=100, max_vocab_size=None, tokenizer=record,
    )  # fmt: skip
    counts = Counts(train=sum(s.tokens for s in listed if s.split == "train"))
    unit = UnitRecord(
        name="x", sha256="0" * 64, documents=1, tokens=counts, bytes=counts, shards=list(listed)
    )
    return Manifest(
        recipe=recipe, dtype=dtype, documents=1, tokens=counts, bytes=counts, units=[unit]
    )


def header(magic: int, version: int, n_tokens: int) -> bytes:
    """Return llm.c's header: 256 int32, the first three of which are used."""
    return struct.pack("<3i", magic, version, n_tokens) + bytes(253 * 4)


def test_a_uint16_shard_is_llm_cs_byte_for_byte(tmp_path: Path) -> None:
    [shard] = write_shards(tmp_path, [50256, 0, 1, 65535], "uint16", 100)
    content = (tmp_path / "train_000003_000.bin").read_bytes()
    assert content == header(20240520, 1, 4) + struct.pack("<4H", 50256, 0, 1, 65535)
    assert shard == Shard(
        file="train_000003_000.bin", split="train", tokens=4,
        sha256=hashlib.sha256(content).hexdigest(),
    )  # fmt: skip


def test_a_uint32_shard_is_llm_cs_byte_for_byte(tmp_path: Path) -> None:
    write_shards(tmp_path, [100257, 0, 2**32 - 1], "uint32", 100, "val")
    content = (tmp_path / "val_000003_000.bin").read_bytes()
    assert content == header(20240801, 7, 3) + struct.pack("<3I", 100257, 0, 2**32 - 1)


def test_the_type_is_the_smallest_that_holds_the_vocabulary() -> None:
    sizes = {257: "uint16", 50257: "uint16", 65536: "uint16", 65537: "uint32", 200019: "uint32"}
    assert {size: dtype_for(size) for size in sizes} == sizes


@pytest.mark.parametrize(("count", "parts"), [(0, 0), (1, 1), (9, 1), (10, 1), (11, 2), (35, 4)])
def test_a_full_shard_is_followed_by_another(tmp_path: Path, count: int, parts: int) -> None:
    listed = write_shards(tmp_path, list(range(count)), "uint16", 10)
    names = [f"train_000003_{part:03d}.bin" for part in range(parts)]
    assert [shard.file for shard in listed] == names
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert [shard.tokens for shard in listed] == [10] * (count // 10) + [count % 10] * bool(
        count % 10
    )
    together = [np.fromfile(tmp_path / name, "<u2")[512:].tolist() for name in names]
    assert [token for part in together for token in part] == list(range(count))


def test_more_parts_than_names_in_order_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """train_000000_1000 would sort between _100 and _101."""
    monkeypatch.setattr("gptcli.data.shard_writer._MAX_PARTS", 3)
    write_shards(tmp_path, list(range(6)), "uint16", 2)
    with pytest.raises(DataError, match="more than 3 shards") as caught:
        write_shards(tmp_path, list(range(7)), "uint16", 2)
    assert caught.value.hint == "choose a larger data.shard_tokens than 2"


def test_an_error_drops_the_shard_that_is_being_written(tmp_path: Path) -> None:
    with pytest.raises(KeyError), ShardWriter(tmp_path, "train", 0, "uint16", 4) as writer:
        writer.append(np.arange(6, dtype=np.uint32))
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["train_000000_000.bin"]


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_reading_across_shards_equals_the_concatenation(tmp_path: Path, dtype: Dtype) -> None:
    tokens = [(i * 7919) % 60_000 for i in range(101)]
    manifest = manifest_of(*write_shards(tmp_path, tokens, dtype, 10), dtype=dtype)
    reader = TokenReader(tmp_path, manifest, "train")
    assert len(reader) == 101

    @settings(max_examples=200, deadline=None)
    @given(ends=st.tuples(st.integers(0, 101), st.integers(0, 101)).map(sorted))
    def check(ends: list[int]) -> None:
        start, end = ends
        read = reader.read(start, end - start)
        assert read.tolist() == tokens[start:end]
        assert read.dtype == np.dtype(dtype)

    check()
    reader.close()


def test_units_follow_each_other_in_the_order_of_their_names(tmp_path: Path) -> None:
    listed = []
    for unit in (2, 0, 11, 1):
        with ShardWriter(tmp_path, "train", unit, "uint16", 2) as writer:
            writer.append(np.array([unit * 10, unit * 10 + 1, unit * 10 + 2], dtype=np.uint32))
        listed += writer.shards
    reader = TokenReader(tmp_path, manifest_of(*listed), "train")
    assert reader.read(0, 12).tolist() == [0, 1, 2, 10, 11, 12, 20, 21, 22, 110, 111, 112]
    reader.close()


def test_many_shards_do_not_keep_many_files_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "_MAX_OPEN_FILES", 2)
    manifest = manifest_of(*write_shards(tmp_path, list(range(20)), "uint16", 4))
    reader = TokenReader(tmp_path, manifest, "train")
    for start in (0, 16, 8, 4, 12, 0):
        assert reader.read(start, 4).tolist() == list(range(start, start + 4))
        assert len(reader._opened) <= 2
    reader.close()
    assert reader._opened == {}


def test_an_empty_split_has_no_tokens(tmp_path: Path) -> None:
    reader = TokenReader(tmp_path, manifest_of(), "val")
    assert len(reader) == 0
    assert reader.read(0, 0).tolist() == []


def test_headerless_shards_are_read_as_listed(tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(struct.pack("<5H", 5, 6, 7, 8, 9))
    shard = Shard(file="train.bin", split="train", tokens=5, sha256="", format="raw-uint16")
    reader = TokenReader(tmp_path, manifest_of(shard), "train")
    assert reader.read(1, 3).tolist() == [6, 7, 8]
    reader.close()


Damage = Callable[[Path], object]


def truncate(size: int) -> Damage:
    """Return a function that cuts a file to its first `size` bytes."""
    return lambda path: path.write_bytes(path.read_bytes()[:size])


def overwrite(at: int, content: bytes) -> Damage:
    """Return a function that changes bytes of a file."""

    def change(path: Path) -> None:
        whole = path.read_bytes()
        path.write_bytes(whole[:at] + content + whole[at + len(content) :])

    return change


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (Path.unlink, "missing; the manifest lists it"),
        (truncate(0), "0 bytes, but 20 tokens take 1,064"),
        (truncate(3), "3 bytes, but 20 tokens take 1,064"),
        (truncate(1024), "1,024 bytes, but"),
        (truncate(1063), "1,063 bytes, but"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "1,065 bytes, but"),
        (overwrite(0, struct.pack("<i", 20240801)), "not a uint16 token shard"),
        (overwrite(4, struct.pack("<i", 7)), "not a uint16 token shard"),
        (overwrite(8, struct.pack("<i", 19)), "not a uint16 token shard"),
        (lambda path: path.write_bytes(bytes(1064)), "not a uint16 token shard"),
        (lambda path: (path.unlink(), path.mkdir()), "not a regular file; the manifest lists it"),
        pytest.param(
            lambda path: (path.unlink(), os.mkfifo(path)),
            "not a regular file; the manifest lists it",
            marks=pytest.mark.skipif(os.name == "nt", reason="needs a pipe"),
        ),
    ],
)
def test_a_shard_that_is_not_what_the_manifest_says(
    tmp_path: Path, damage: Damage, problem: str
) -> None:
    manifest = manifest_of(*write_shards(tmp_path, list(range(20)), "uint16", 100))
    path = tmp_path / "train_000003_000.bin"
    damage(path)
    with pytest.raises(DataError) as caught:
        TokenReader(tmp_path, manifest, "train")
    assert caught.value.message.startswith(f"{path}: {problem}")
    assert "gpt prepare --force" in (caught.value.hint or "")


def test_a_uint16_shard_is_no_uint32_shard(tmp_path: Path) -> None:
    [shard] = write_shards(tmp_path, list(range(20)), "uint16", 100)
    half = shard.model_copy(update={"tokens": 10})
    with pytest.raises(DataError, match="not a uint32 token shard"):
        TokenReader(tmp_path, manifest_of(half, dtype="uint32"), "train")


def test_a_shard_that_shrinks_or_goes_while_in_use(tmp_path: Path) -> None:
    manifest = manifest_of(*write_shards(tmp_path, list(range(20)), "uint16", 10))
    reader = TokenReader(tmp_path, manifest, "train")
    assert reader.read(0, 5).tolist() == [0, 1, 2, 3, 4]
    truncate(1030)(tmp_path / "train_000003_000.bin")
    (tmp_path / "train_000003_001.bin").unlink()
    with pytest.raises(DataError, match=r"train_000003_000\.bin: became shorter"):
        reader.read(0, 5)
    with pytest.raises(DataError, match=r"train_000003_001\.bin: No such file"):
        reader.read(10, 5)
    reader.close()


def test_a_manifest_reads_back_the_same(tmp_path: Path) -> None:
    manifest = manifest_of(*write_shards(tmp_path, list(range(20)), "uint16", 10))
    (tmp_path / "manifest.json").write_text(manifest.model_dump_json())
    again = shards.read_manifest(tmp_path)
    assert again == manifest
    assert again.fingerprint == manifest.fingerprint


def test_the_fingerprint_is_over_content_and_tokenizer_not_names(tmp_path: Path) -> None:
    [shard] = write_shards(tmp_path, list(range(20)), "uint16", 100)
    manifest = manifest_of(shard)
    renamed = shard.model_copy(update={"file": "train_000099_000.bin"})
    assert manifest_of(renamed).fingerprint == manifest.fingerprint
    other = shard.model_copy(update={"sha256": "0" * 64})
    assert manifest_of(other).fingerprint != manifest.fingerprint
    validation = shard.model_copy(update={"split": "val"})
    assert manifest_of(validation).fingerprint != manifest.fingerprint
    recipe = manifest.recipe.model_copy(
        update={"tokenizer": TokenizerRecord(name="bytes", vocab_size=257, sha256="0" * 64)}
    )
    assert manifest.model_copy(update={"recipe": recipe}).fingerprint != manifest.fingerprint


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", '{"name": "web app", "icons": []}', '{"format": "gptcli-data"}'],
)
def test_a_damaged_manifest_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=r"manifest\.json: damaged manifest \(.+\)$"):
        shards.read_manifest(tmp_path)


def test_a_manifest_of_another_version_or_with_wrong_types_is_refused(tmp_path: Path) -> None:
    content = manifest_of().model_dump()
    for change in ({"version": 2}, {"format": "x"}, {"documents": "1"}, {"extra": 1}):
        (tmp_path / "manifest.json").write_text(json.dumps(content | change))
        with pytest.raises(DataError, match="damaged manifest") as caught:
            shards.read_manifest(tmp_path)
        assert next(iter(change)) in caught.value.message


def test_a_folder_without_a_manifest_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not prepared") as caught:
        shards.read_manifest(tmp_path)
    assert "gpt prepare" in (caught.value.hint or "")
    with pytest.raises(DataError, match="does not exist"):
        shards.read_manifest(tmp_path / "none")


def test_the_tokenizer_must_be_the_one_of_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(dump_tokenizer(BYTES))
    assert shards.read_tokenizer(tmp_path, manifest_of()).name == "bytes"
    other = tokenizer_from({"name": "char", "alphabet": "ab"})
    (tmp_path / "tokenizer.json").write_bytes(dump_tokenizer(other))
    with pytest.raises(DataError, match="not the tokenizer that wrote these shards"):
        shards.read_tokenizer(tmp_path, manifest_of())
