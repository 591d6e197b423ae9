"""Files to documents: every kind, gzipped or not, whole or damaged."""

import csv
import gzip
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gptcli.data import readers
from gptcli.errors import DataError, GptError, StorageError
from gptcli.tokenizers import SAFE_CUT

Write = Callable[..., Path]

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


ROWS = ["one", "", 'two\nlines\r\nand a "quote", a comma', "caf\u00e9 \U0001f600\u2028", " x "]


def jsonl(rows: Sequence[str | None]) -> bytes:
    """Return rows as lines of JSON."""
    return "".join(json.dumps({"id": 1, "text": row}) + "\n" for row in rows).encode()


def as_csv(rows: list[str], end: str = "\r\n") -> bytes:
    """Return rows as CSV with another column before the text."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator=end)
    writer.writerow(["id", "text"])
    writer.writerows([str(i), row] for i, row in enumerate(rows))
    return file.getvalue().encode()


def parquet(rows: Any, **options: Any) -> bytes:
    """Return rows as Parquet with another column before the text."""
    file = io.BytesIO()
    column = rows if isinstance(rows, pa.Array) else pa.array(rows, pa.string())
    pq.write_table(pa.table({"id": list(range(len(column))), "text": column}), file, **options)
    return file.getvalue()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "A.JSONL"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_jsonl_rows(write: Write, name: str, mark: bytes) -> None:
    assert rows_of(write(name, mark + jsonl([*ROWS, None]))) == [*ROWS, ""]
    assert rows_of(write(name, mark + jsonl([*ROWS]).rstrip(b"\n"))) == ROWS


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "A.CSV"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_csv_rows(write: Write, name: str, mark: bytes, end: str) -> None:
    """Newlines inside quotes belong to the row, and are kept as they are."""
    assert rows_of(write(name, mark + as_csv(ROWS, end))) == ROWS


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_parquet_rows(write: Write, kind: Any) -> None:
    rows = [*ROWS, None] * 700
    content = parquet(pa.array(rows, kind), row_group_size=1000)
    assert rows_of(write("a.parquet", content)) == [*ROWS, ""] * 700


def test_files_without_rows_have_no_documents(write: Write) -> None:
    assert rows_of(write("a.jsonl", b"")) == []
    assert rows_of(write("a.jsonl", b"\n  \r\n")) == []
    assert rows_of(write("a.csv", b"")) == []
    assert rows_of(write("a.csv", b"id,text\n")) == []
    assert rows_of(write("a.parquet", parquet([]))) == []


def test_blank_lines_are_no_rows(write: Write) -> None:
    assert rows_of(write("a.jsonl", b'\n{"text": "a"}\n\n{"text": "b"}\r\n\n')) == ["a", "b"]
    assert rows_of(write("a.csv", b'text\n\na\n\n""\nb\n\n')) == ["a", "", "b"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"title": "x", "body": "y"}\n'),
        ("a.jsonl.gz", b'{"title": "x", "body": "y"}\n'),
        ("a.csv", b"title,body\nx,y\n"),
    ],
)
def test_a_missing_field_lists_the_fields(write: Write, name: str, content: bytes) -> None:
    path = write(name, content)
    error = refusal(rows_of, path)
    assert error.message == f"{path}: no field 'text'; the fields are: title, body"
    assert (error.hint or "").endswith("-s data.text_field=title")
    assert rows_of(path, "body") == ["y"]


def test_a_missing_column_lists_the_columns(write: Write) -> None:
    path = write("a.parquet", parquet(["a"]))
    error = refusal(rows_of, path, "body")
    assert error.message == f"{path}: no field 'body'; the fields are: id, text"
    assert refusal(rows_of, path, "id").message == f"{path}: field 'id' is int64, not text"


def test_a_field_missing_from_a_later_row_is_an_error(write: Write) -> None:
    path = write("a.jsonl", b'{"text": "a"}\n{"txt": "b"}\n')
    assert "no field 'text'; the fields are: txt" in refusal(rows_of, path).message


def test_a_jsonl_row_without_fields(write: Write) -> None:
    error = refusal(rows_of, write("a.jsonl", b"{}\n"))
    assert error.message.endswith("no field 'text'; the fields are: none")
    assert error.hint is None


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"not json", "line 3 is not JSON (Expecting value)"),
        (b'{"text": "a"', "line 3 is not JSON"),
        (b'{"text": "a"} {"text": "b"}', "line 3 is not JSON (Extra data)"),
        (b"[" * 100_000, "line 3 is not JSON"),
        (b'{"text": ' + b"9" * 5000 + b"}", "line 3 is not JSON"),
        (b"[1]", "line 3 is not a JSON object with fields"),
        (b'"text"', "line 3 is not a JSON object with fields"),
        (b'{"text": 5}', "line 3: 'text' is a int, not text"),
        (b'{"text": ["a"]}', "line 3: 'text' is a list, not text"),
        (b'{"text": "ab\\ud800c"}', "line 3: unpaired surrogate at character 2"),
    ],
)
def test_a_wrong_line_is_named(write: Write, line: bytes, problem: str) -> None:
    path = write("a.jsonl", b'{"text": "a"}\n\n' + line + b"\n")
    assert refusal(rows_of, path).message.startswith(f"{path}: {problem}")


def test_whole_surrogate_pairs_are_text_and_halves_can_be_replaced(write: Write) -> None:
    assert rows_of(write("a.jsonl", b'{"text": "\\ud83d\\ude00"}')) == ["\U0001f600"]
    for spelled, text in [
        (rb"a\ud800", "a\ufffd"),
        (rb"\ud800a", "\ufffda"),
        (rb"\ude00\ud83d", "\ufffd\ufffd"),
        (rb"\ud83d\ud83d\ude00", "\ufffd\U0001f600"),
        (rb"\ufeff\ud800", "\ufeff\ufffd"),
    ]:
        path = write("a.jsonl", b'{"text": "' + spelled + b'"}')
        assert rows_of(path, errors="replace") == [text]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.csv.gz"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_invalid_utf8_in_rows_names_the_byte(write: Write, name: str, mark: bytes) -> None:
    before = mark + (b"text\nfirst\n" if ".csv" in name else b'{"text": "first"}\n{"text": "')
    path = write(name, before + b"a\xff\n" if ".csv" in name else before + b'a\xff"}\n')
    assert refusal(rows_of, path).message == f"{path}: not UTF-8 at byte {len(before) + 1}"
    assert rows_of(path, errors="replace") == ["first", "a\ufffd"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b'id,text\n1,"a\n2,b\n', "is not CSV (unexpected end of data)"),
        (b'id,text\n1,"a"b\n', "line 2 is not CSV"),
        (b"id,text\n1,a\n2\n", "line 3 has 1 fields, the header 2"),
        (b"id,text\r1,a\r", "is not CSV"),
    ],
)
def test_what_is_not_csv_names_the_line(write: Write, content: bytes, problem: str) -> None:
    path = write("a.csv", content)
    assert problem in refusal(rows_of, path).message


def test_csv_fields_may_be_long(write: Write) -> None:
    """Python's own limit is 131,072 characters."""
    assert rows_of(write("a.csv", as_csv(["x" * 300_000]))) == ["x" * 300_000]


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.csv.gz"])
def test_a_truncated_gzip_file_is_refused(write: Write, name: str) -> None:
    read = text_of if name == "a.txt.gz" else rows_of
    rows = [os.urandom(50).hex() for _ in range(600)]
    content = gzip.compress(as_csv(rows) if name == "a.csv.gz" else jsonl(rows))
    for length in (1, 9, 15, 5000, len(content) - 9, len(content) - 1):
        path = write(name, content[:length], raw=True)
        error = refusal(read, path)
        assert error.message.startswith(f"{path}: damaged gzip file ("), length


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


def test_a_truncated_parquet_file_is_refused(write: Write) -> None:
    content = parquet([f"row {i}" for i in range(2000)])
    for length in (0, 1, 4, 100, len(content) // 2, len(content) - 1):
        path = write("a.parquet", content[:length])
        error = refusal(rows_of, path)
        assert error.message.startswith(f"{path}: damaged Parquet file ("), length
        assert "\n" not in error.message


def test_a_parquet_file_with_damaged_pages_is_refused(write: Write) -> None:
    rows = [f"row {i}" for i in range(2000)]
    content = bytearray(parquet(rows, write_page_checksum=True, compression="none"))
    content[content.index(b"row 1000")] ^= 1
    assert "CRC checksum" in refusal(rows_of, write("a.parquet", bytes(content))).message


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


def test_parquet_with_bytes_that_are_no_text(write: Write) -> None:
    texts = pa.array([b"fine", b"a\xffb", None], pa.binary()).view(pa.string())
    path = write("a.parquet", b"")
    pq.write_table(pa.table({"text": texts}), path)
    assert list(readers.read_rows(path, "text", "replace")) == ["fine", "a\ufffdb", ""]
    with pytest.raises(DataError, match=r"a\.parquet: row 1: not UTF-8 at byte 1") as caught:
        list(readers.read_rows(path, "text", "strict"))
    assert "encoding_errors=replace" in (caught.value.hint or "")


def test_parquet_with_a_dictionary_of_texts(write: Write) -> None:
    path = write("a.parquet", b"")
    pq.write_table(pa.table({"text": pa.array(["x", "y", "x"]).dictionary_encode()}), path)
    assert list(readers.read_rows(path, "text", "strict")) == ["x", "y", "x"]
