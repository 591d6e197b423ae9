"""Text files to documents: gzipped or not, whole or damaged, cut at safe places."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gptcli.data import readers
from gptcli.errors import DataError, GptError, StorageError
from gptcli.tokenizers import SAFE_CUT
from support.folders import Prepared, Write

TEXT = "first line\r\nsecond \u00e9\U0001f600 line\n\n<|endoftext|>\rlast"


def text_of(path: Path, errors: str = "strict") -> str:
    """Return the one document of a text file."""
    return "".join(readers.read_text(path, errors, SAFE_CUT))


def rows_of(path: Path, field: str = "text", errors: str = "strict") -> list[str]:
    """Return the documents of a file of rows."""
    return list(readers.read_rows(path, field, errors))


def refusal(read: Callable[..., object], *arguments: object) -> GptError:
    """Return the error of a file that cannot be used."""
    with pytest.raises(GptError) as caught:
        read(*arguments)
    assert caught.value.exit_code == 3
    return caught.value


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "A.TXT", "a.txt.gz", "A.MD.GZ"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_a_text_file_is_one_document_as_it_is(write: Write, name: str, mark: bytes) -> None:
    """Newlines stay what they are; a byte-order mark is not text."""
    assert text_of(write(name, mark + TEXT.encode())) == TEXT


def test_only_a_leading_mark_is_dropped(write: Write) -> None:
    assert text_of(write("a.txt", "\ufeff\ufeffa\ufeffb")) == "\ufeffa\ufeffb"


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf"])
def test_an_empty_file_is_one_empty_piece(write: Write, name: str, content: bytes) -> None:
    assert list(readers.read_text(write(name, content), "strict", SAFE_CUT)) == [""]


@pytest.mark.parametrize("block", [3, 4, 5, 7, 64])
def test_text_comes_in_pieces_cut_at_safe_places(
    write: Write, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(readers, "_BLOCK_BYTES", block)
    text = "na\u00efve caf\u00e9\n\n    code \U0001f600 smile\nand more words.\n" * 20
    pieces = list(readers.read_text(write("a.txt", text), "strict", SAFE_CUT))
    assert "".join(pieces) == text
    assert len(pieces) > 10
    at = 0
    for piece in pieces[:-1]:
        at += len(piece)
        assert SAFE_CUT.match(text, at)


def test_pieces_stay_small_whatever_the_files_size(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_BLOCK_BYTES", 1000)
    pieces = list(readers.read_text(write("a.txt", "some words " * 5000), "strict", SAFE_CUT))
    assert max(map(len, pieces)) < 2100


def test_text_without_a_place_to_cut_is_one_piece(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_BLOCK_BYTES", 100)
    text = "\u4f60\u597d1234,   \n" * 500
    assert list(readers.read_text(write("a.txt", text), "strict", SAFE_CUT)) == [text]


def test_an_endless_word_is_cut_before_it_fills_the_memory(
    write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_BLOCK_BYTES", 100)
    monkeypatch.setattr(readers, "_MAX_HELD", 1000)
    path = write("a.txt", "x" * 10_050 + " and words")
    pieces = list(readers.read_text(path, "strict", SAFE_CUT))
    assert "".join(pieces) == path.read_text() and max(map(len, pieces)) <= 1100


@pytest.mark.parametrize("text", ["some words " * 500, "x" * 2500, "", "x" * 1000, "a b"])
def test_a_row_is_cut_as_a_file_is(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_MAX_HELD", 1000)
    pieces = list(readers.in_pieces(text, SAFE_CUT))
    assert "".join(pieces) == text and max(map(len, pieces)) <= 1000
    assert all(piece.startswith(" ") for piece in pieces[1:]) or " " not in text


@pytest.mark.parametrize("block", [3, 4, 5, 16, 1 << 20])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
@pytest.mark.parametrize(
    ("content", "offset"),
    [
        (b"\xff", 0),
        (b"abc\xffdef", 3),
        (b"abcde\xc3", 5),  # cut inside a character, at the end
        (b"abc\xc3(", 3),
        (b"ab\xf0\x9f\x98", 2),
        (b"ab\xf0\x9f\x98 cd", 2),
        (b"a word \xc3\xa9\xe2\x82 and more", 9),
        (b"\xed\xa0\x80", 0),  # an unpaired surrogate
        (b"abcdef\xc0\xaf", 6),  # an overlong form
    ],
)
def test_invalid_utf8_names_file_and_byte(
    write: Write,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    mark: bytes,
    block: int,
    content: bytes,
    offset: int,
) -> None:
    """The place counts from the start of the file, wherever the blocks end."""
    monkeypatch.setattr(readers, "_BLOCK_BYTES", block)
    path = write(name, mark + content)
    error = refusal(text_of, path)
    assert error.message == f"{path}: not UTF-8 at byte {len(mark) + offset}"
    assert "data.encoding_errors=replace" in (error.hint or "")
    assert text_of(path, "replace") == content.decode("utf-8", "replace")


@settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(content=st.binary(max_size=24), block=st.integers(3, 8))
@example(content=b"\xe2\x82", block=3)
def test_any_bytes_decode_as_python_decodes_them(write: Write, content: bytes, block: int) -> None:
    path = write("a.txt", content)
    body = content.removeprefix(b"\xef\xbb\xbf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "_BLOCK_BYTES", block)
        assert text_of(path, "replace") == body.decode("utf-8", "replace")
        try:
            expected = body.decode()
        except UnicodeDecodeError as error:
            place = error.start + len(content) - len(body)
            assert refusal(text_of, path).message.endswith(f"at byte {place}")
        else:
            assert text_of(path) == expected


@pytest.mark.parametrize("damage", ["not gzip", "flipped", "trailing"])
def test_a_damaged_gzip_file_is_refused(write: Write, damage: str) -> None:
    content = bytearray(gzip.compress(b"some text " * 1000, mtime=0))
    match damage:
        case "not gzip":
            content = bytearray(b"plain text")
        case "flipped":
            content[-6] ^= 1  # in the checksum
        case "trailing":
            content += b"garbage"
    path = write("a.txt.gz", bytes(content), raw=True)
    assert refusal(text_of, path).message.startswith(f"{path}: damaged gzip file (")


def test_a_gzip_file_of_several_members_is_one_document(write: Write) -> None:
    content = gzip.compress(b"one ") + gzip.compress(b"two")
    assert text_of(write("a.txt.gz", content, raw=True)) == "one two"


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.csv.gz", "a.parquet"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    read = text_of if ".txt" in name else rows_of
    assert refusal(read, path).message == f"{path}: No such file or directory"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz", "a.parquet"])
def test_a_file_without_permission_is_named(
    write: Write, name: str, without_privileges: Callable[[], Any]
) -> None:
    path = write(name, b"x")
    path.chmod(0)
    read = text_of if ".txt" in name else rows_of
    with without_privileges(), pytest.raises(StorageError, match=f"{name}: Permission denied"):
        read(path)


def test_the_kind_is_the_last_suffix_before_gz() -> None:
    names = {"a.txt": ".txt", "A.TXT.GZ": ".txt", "a.b.jsonl": ".jsonl", "a": "", "a.gz": "",
             ".txt": "", "a.tar.gz": ".tar"}  # fmt: skip
    assert {name: readers.suffix_of(Path("x.csv") / name) for name in names} == names
    assert DataError.exit_code == 3


@pytest.mark.parametrize(("name", "tool"), [
    ("my report.docx", "pandoc"), ("a.ODT", "pandoc"), ("a.rtf", "pandoc"), ("a.epub", "pandoc"),
    ("a.html", "pandoc"), ("my book.pdf", "pdftotext"), ("a.mobi", "ebook-convert"),
    ("a.zip", "unzip"),
])  # fmt: skip
def test_what_has_to_be_converted_names_the_tool(
    write: Write, prepared: Prepared, name: str, tool: str
) -> None:
    path = write(name, b"PK\3\4\xff")
    error = refusal(text_of, path)
    assert error.message == f"{path}: {path.suffix.lower()} files are not read"
    assert (error.hint or "").startswith(f"convert it: {tool} ")
    write(f"papers/{name}", b"PK\3\4\xff")
    with pytest.raises(GptError, match="papers: no text in this folder") as caught:
        prepared("papers")
    hint = f"convert its {path.suffix.lower()} files: {tool} "
    assert (caught.value.hint or "").startswith(hint)
