"""Compressed text and tar archives: read as streams, bounded, nothing of them on the disk."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptcli.data import archives, readers
from gptcli.data.shards import TokenReader
from gptcli.errors import GptError
from support.folders import Prepared, Refusal, Write

from .test_readers import TEXT, refusal, rows_of, text_of

OUT = Path("data/out")
PACK: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pa.Codec("zstd").compress(data).to_pybytes(),
}
CODE = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}


def tar(*members: tuple[str, bytes], form: int = tarfile.PAX_FORMAT, **kinds: bytes) -> bytes:
    """Return an archive of files, and of members of other kinds."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as archive:
        for name, kind in kinds.items():
            other = tarfile.TarInfo(f"{name}.txt")
            other.type, other.linkname = kind, "/etc/passwd"
            archive.addfile(other)
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file.getvalue()


def contents(path: Path) -> dict[str, bytes]:
    """Return the members that are read, by their names in the archive."""
    with archives.open_file(path) as (file, _):
        return {m.path: m.content.read() for m in archives.tar_members(path, file)}


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_compressed_text_is_the_text(write: Write, suffix: str, mark: bytes) -> None:
    data = mark + TEXT.encode() * 3
    assert text_of(write("a.txt" + suffix, PACK[suffix](data), raw=True)) == TEXT * 3
    assert text_of(write("B.TXT" + suffix.upper(), PACK[suffix](data), raw=True)) == TEXT * 3
    assert text_of(write("c.txt" + suffix, PACK[suffix](b""), raw=True)) == ""


@pytest.mark.parametrize("suffix", PACK)
def test_streams_one_after_the_other_are_one_text(write: Write, suffix: str) -> None:
    data = PACK[suffix](b"one ") + PACK[suffix](b"two")
    assert text_of(write("a.txt" + suffix, data, raw=True)) == "one two"


@pytest.mark.parametrize("suffix", PACK)
def test_compressed_rows_are_the_rows(write: Write, suffix: str) -> None:
    rows = b'{"text": "a"}\n{"text": "b"}\n'
    assert rows_of(write("a.jsonl" + suffix, PACK[suffix](rows), raw=True)) == ["a", "b"]
    assert rows_of(write("a.csv" + suffix, PACK[suffix](b"text\nx\n"), raw=True)) == ["x"]


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("damage", ["plain", "cut", "flipped"])
def test_damage_is_named_with_the_file(write: Write, suffix: str, damage: str) -> None:
    data = bytearray(PACK[suffix](bytes(range(97, 123)) * 5000))
    match damage:
        case "plain":
            data = bytearray(b"plain text that nothing packed")
        case "cut":
            del data[-len(data) // 3 :]
        case "flipped":
            data[len(data) // 2] ^= 255
    path = write("a.txt" + suffix, bytes(data), raw=True)
    if damage == "flipped" and suffix == ".zst":
        return  # pyarrow writes no checksum; what decodes is text
    assert refusal(text_of, path).message.startswith(f"{path}: damaged {CODE[suffix]} file (")


@pytest.mark.parametrize("suffix", PACK)
def test_what_expands_beyond_reason_is_refused(
    write: Write, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "_FREE_BYTES", 100_000)
    monkeypatch.setattr(archives, "_MOST_TIMES", 50)
    path = write("bomb.txt" + suffix, PACK[suffix](b"0" * 3_000_000), raw=True)
    error = refusal(text_of, path)
    assert error.message.startswith(f"{path}: expands to more than ")
    assert "unpack it" in (error.hint or "")
    within = write("text.txt" + suffix, PACK[suffix](b"0" * 100_000), raw=True)
    assert len(text_of(within)) == 100_000


def test_the_bound_is_above_what_gzip_can_do_with_a_gigabyte_less_than_it_allows() -> None:
    assert archives._FREE_BYTES >= 1 << 28 and archives._MOST_TIMES >= 1000


def test_a_line_without_end_does_not_fill_the_memory(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_MAX_LINE_BYTES", 1000)
    path = write("a.jsonl.xz", lzma.compress(b'{"text": "a"}\n' + b" " * 5000), raw=True)
    assert refusal(rows_of, path).message == f"{path}: line 2 has more than 1 kB"


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("suffix", ["", *PACK])
def test_the_members_of_an_archive_are_read_in_order(write: Write, form: int, suffix: str) -> None:
    long = "folder/" * 13 + "name.txt"
    files = [("b.txt", b"one"), (long, b"\xc3\xa9" * 700), ("./a.md", b""), ("z.bin", b"\0" * 512)]
    data = tar(*files, form=form)
    path = write("x.tar" + suffix, PACK[suffix](data) if suffix else data, raw=True)
    assert list(contents(path).items()) == files
    assert [member.name for member in readers.files_in(path)] == ["b.txt", "name.txt", "a.md"]


def test_names_of_any_length_and_alphabet(write: Write) -> None:
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        name = "d\u00e9p\u00f4t/" * 60 + "\u4f60.txt"
        assert contents(write("x.tar", tar((name, b"text"), form=form))) == {name: b"text"}


def test_links_devices_folders_and_hidden_files_are_skipped(write: Write) -> None:
    kinds = {f"kind{n}": b"%d" % n for n in range(1, 7)}
    hidden = [("._a.txt", b"\0\1"), (".git/b.txt", b"x"), ("c/.d.txt", b"x")]
    path = write("x.tar", tar(*hidden, ("a.txt", b"text"), **kinds))
    assert contents(path) == {"a.txt": b"text"}


def test_no_name_leads_out_of_an_archive(write: Write, prepared: Prepared) -> None:
    """A name is what messages call a member; nothing is written by it."""
    names = ["../../evil.txt", "/etc/evil.txt", "a/../../b.txt", "x\x1b[2J.txt", "b.txt"]
    write("x.tar", tar(*((name, b"some text " * 30) for name in names)))
    manifest = prepared("x.tar")
    assert manifest.documents == 5 and not Path("/etc/evil.txt").exists()
    outside = list(Path("../..").resolve().glob("evil*"))
    assert not [*outside, *Path("..").resolve().rglob("evil.txt"), *Path().rglob("b.txt")]


def test_an_archive_of_rows_and_texts_is_its_documents(write: Write, prepared: Prepared) -> None:
    rows = b"".join(b'{"text": "row %d"}\n' % i for i in range(150))
    files = [("a.txt", b"a text"), ("a.cls", b"7"), ("b.jsonl.gz", gzip.compress(rows))]
    write("x.tar.zst", PACK[".zst"](tar(*files)), raw=True)
    assert prepared("x.tar.zst").documents == 151


def test_the_bytes_are_those_of_the_same_rows_in_a_file(write: Write, prepared: Prepared) -> None:
    rows = b"".join(b'{"text": "row %d"}\n' % i for i in range(300))
    write("plain/x.jsonl", rows)
    write("packed/x.tgz", gzip.compress(tar(("rows.jsonl", rows))), raw=True)
    hashes = []
    for source, workers in (("plain", 1), ("packed", 1), ("packed", 2)):
        out = Path(f"data/{source}{workers}")
        manifest = prepared(source, "data.val_fraction=0.2", out=out, workers=workers)
        hashes.append([shard.sha256 for unit in manifest.units for shard in unit.shards])
    assert hashes[0] == hashes[1] == hashes[2] and len(hashes[0]) == 2


def test_conversations_come_out_of_archives(write: Write, prepared: Prepared) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    row = json.dumps({"messages": turns}).encode() + b"\n"
    write("x.tar", tar(("a.jsonl", row * 60), ("b.jsonl", row * 60)))
    manifest = prepared("x.tar")
    assert manifest.is_chat and manifest.documents == 120
    write("y.tar", tar(("a.jsonl", row), ("b.jsonl", b'{"messages": []}\n')))
    with pytest.raises(GptError, match=r"y.tar: b.jsonl: line 1: "):
        prepared("y.tar", out=Path("data/y"))


def test_an_archive_without_text_says_what_is_in_it(write: Write) -> None:
    path = write("x.tar", tar(("a.jpg", b"x"), ("b.cls", b"1"), ("LICENSE", b"")))
    error = refusal(list, readers.files_in(path))
    assert error.message == f"{path}: no text in this archive, only .jpg, .cls, LICENSE"
    path = write("y.tar", tar(("a.txt", b"x"), ("in.parquet", b"PAR1")))
    error = refusal(list, readers.files_in(path))
    assert error.message == f"{path}: in.parquet: .parquet files are not read from archives"


def test_errors_name_the_file_the_member_and_the_line(write: Write, refusal: Refusal) -> None:
    write("x.tar", tar(("a.txt", b"fine"), ("b.txt", b"bad \xff")))
    assert refusal("x.tar").message == "x.tar: b.txt: not UTF-8 at byte 4"
    write("y.tar", tar(("in/rows.jsonl", b'{"text": "a"}\n{]\n')))
    assert refusal("y.tar").message.startswith("y.tar: in/rows.jsonl: line 2 is not JSON (")
    write("z.tar", tar(("a.txt.gz", b"not gzip")))
    assert refusal("z.tar").message.startswith("z.tar: a.txt.gz: damaged gzip file (")


def test_an_archive_that_is_cut_anywhere_is_whole_files_or_refused(write: Write) -> None:
    files = [("a.txt", b"x" * 700), ("b.txt", b"y" * 100)]
    data = tar(*files)
    for end in range(0, 512 * 5, 64):
        path = write("x.tar", data[:end])
        if end in (0, 512 * 3, 512 * 5):  # between members: the end mark may be missing
            assert list(contents(path).items()) == files[: (end > 0) + (end > 1536)]
        else:
            assert refusal(contents, path).message.startswith(f"{path}: damaged tar archive (")


@pytest.mark.parametrize(
    ("place", "field"),
    [
        (124, b"77777777777\0"), (124, b"\xff" * 12), (124, b"\x80" + b"\xff" * 11),
        (124, b"9" * 12), (156, b"S"), (156, b"x"), (156, b"L"), (148, b"0000000\0"), (0, b"\xff"),
    ],
)  # fmt: skip
def test_a_header_of_the_impossible_is_refused(write: Write, place: int, field: bytes) -> None:
    data = bytearray(tar(("a.txt", b"text"), form=tarfile.USTAR_FORMAT))
    data[place : place + len(field)] = field
    if place != 0:
        data[148:156] = b" " * 8
        data[148:156] = b"%06o\0 " % sum(data[:512])
    if place == 148:
        data[148:156] = field
    assert "x.tar: " in refusal(contents, write("x.tar", bytes(data))).message


def test_a_header_of_gigabytes_is_not_read(write: Write) -> None:
    info = tarfile.TarInfo("long")
    info.type, info.size = b"x", 1 << 33
    path = write("x.tar", info.tobuf(tarfile.GNU_FORMAT) + b"0" * 5000)
    assert "a name of 8,589,934,592 bytes" in refusal(contents, path).message


def header(name: str, kind: bytes, n_bytes: int) -> bytes:
    """Return the header of a member whose content follows."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, n_bytes
    return info.tobuf(tarfile.GNU_FORMAT)


def test_names_that_never_end_are_refused(write: Write) -> None:
    record = b"13 comment=x\n"
    chain = header("x", b"x", len(record)) + record.ljust(512, b"\0")
    path = write("x.tar", chain * 100 + tar(("a.txt", b"text")))
    assert "damaged tar archive (names of 66," in refusal(contents, path).message
    path = write("x.tar", chain * 4 + tar(("a.txt", b"text")))
    assert contents(path) == {"a.txt": b"text"}


@pytest.mark.parametrize("name", [".hidden.txt", "a.txt"])
def test_a_member_of_more_bytes_than_there_are_is_damage(write: Write, name: str) -> None:
    path = write("x.tar", header(name, b"0", 1 << 60) + b"x" * 5000)
    assert "damaged tar archive (unexpected end of data)" in refusal(contents, path).message


@pytest.mark.parametrize("major", [b"", b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"])
def test_the_map_of_a_sparse_file_is_not_read(write: Write, major: bytes) -> None:
    names = header("x", b"x", len(major)) + major.ljust(512, b"\0") if major else b""
    path = write("x.tar", names + header("a.txt", b"0" if major else b"S", 1024) + b"9" * 1024)
    assert refusal(contents, path).message.endswith(
        "x.tar: a.txt: sparse files are not read from archives"
    )


def test_a_compressed_member_leaves_the_archive_open(write: Write, prepared: Prepared) -> None:
    """Its reader closes what it reads from; the member after it is read."""
    rows = PACK[".zst"](b"".join(b'{"text": "row %d"}\n' % i for i in range(150)))
    write("x.tar", tar(("a.jsonl.zst", rows), ("b.jsonl.zst", rows)), raw=True)
    assert prepared("x.tar").documents == 300


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(place=st.integers(0, 2047), value=st.integers(0, 255))
def test_any_changed_byte_gives_members_or_an_error_of_the_data(
    write: Write, place: int, value: int
) -> None:
    data = bytearray(tar(("\u00e9" * 40 + ".txt", b"text" * 9), ("b.txt", b"more")))
    data[place] = value
    path = write("x.tar", bytes(data))
    try:
        contents(path)
    except GptError as error:
        assert error.exit_code == 3 and error.message.startswith(f"{path}: ")


def test_a_failed_archive_leaves_nothing(gpt: Any, write: Write) -> None:
    write("x.tar", tar(("a.txt", b"text"))[:700])
    done = gpt("prepare", "x.tar", "-s", "tokenizer.name=bytes")
    assert done.code == 3 and len(done.err_lines) <= 3 and not Path("data").exists()


def test_tokens_of_a_small_archive_end_in_its_validation_text(
    write: Write, prepared: Prepared
) -> None:
    write("x.tar", tar(*((f"{i}.txt", b"words and words\n") for i in range(30))))
    manifest = prepared("x.tar", "data.val_fraction=0.1")
    with TokenReader(OUT, manifest, "val") as reader:
        assert len(reader) == pytest.approx(manifest.tokens.total / 10, abs=2)
