"""Rows to documents: jsonl, csv and Parquet, gzipped or not, whole or damaged."""

import csv
import gzip
import io
import json
import os
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptcli.data import readers
from gptcli.errors import DataError
from support.folders import Write

from .test_readers import refusal, rows_of, text_of

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
    assert refusal(rows_of, path, "id").message == f"{path}: row 0: 'id' is a int, not text"


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
