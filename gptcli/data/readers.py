"""Read documents from files: plain text, or rows such as jsonl, csv and Parquet; gzipped or not.

A document is read in pieces, cut only where every tokenizer would split, so memory stays bounded
for any file size.
"""

import codecs
import contextlib
import csv
import errno
import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from gptcli.atomic import storage_errors
from gptcli.data.messages import format_of
from gptcli.errors import DataError

_BLOCK_BYTES = 4 << 20
_MAX_HELD = 4 << 20  # characters without a safe place to cut, before the text is cut anywhere
_MAX_FIELD_CHARS = 1 << 26  # of CSV; more is a quotation mark that is never closed
_REPLACE = "replace the invalid bytes by U+FFFD with -s data.encoding_errors=replace"


def suffix_of(path: Path) -> str:
    """Return the file's kind: its last suffix, without a `.gz` after it."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def shown(path: str | Path) -> str:
    """Return a name as text; bytes of it that are not UTF-8 become U+FFFD."""
    return os.fsencode(path).decode("utf-8", "replace")


def read_text(path: Path, errors: str, cut: re.Pattern[str]) -> Iterator[str]:
    """Yield a text file, which is one document, in pieces; an empty file is one empty piece.

    Args:
        path: The file; its newlines are kept as they are, a byte-order mark is not.
        errors: "strict" or "replace", for bytes that are not UTF-8.
        cut: Matches where the text may be cut.

    Raises:
        DataError: The file cannot be read or is not UTF-8, with the byte offset.
    """
    with _open(path) as (file, offset):
        decoder = codecs.getincrementaldecoder("utf-8")(errors)
        held, is_empty = "", True
        while True:
            block = file.read(_BLOCK_BYTES)
            # The decoder keeps up to three bytes of a character that the last block cut.
            n_kept = len(decoder.getstate()[0])
            try:
                held += decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, offset - n_kept + error.start) from None
            offset += len(block)
            if not block:
                break
            at = _last_cut(held, cut)
            if not at and len(held) >= _MAX_HELD:
                at = len(held)  # no word ends in all of it; memory comes first
            if at:
                yield held[:at]
                held, is_empty = held[at:], False
        if held or is_empty:
            yield held


def _last_cut(text: str, cut: re.Pattern[str]) -> int:
    """Return the last place where `text` may be cut, 0 if there is none."""
    width = 4096
    while True:
        start = max(0, len(text) - width)
        last = 0
        for match in cut.finditer(text, start):
            last = match.start()
        if last or start == 0:
            return last
        width *= 8


def in_pieces(text: str, cut: re.Pattern[str]) -> Iterator[str]:
    """Yield a row's text in pieces, as `read_text` does; most are one."""
    start = 0
    while len(text) - start > _MAX_HELD:
        end = start + (_last_cut(text[start : start + _MAX_HELD], cut) or _MAX_HELD)
        yield text[start:end]
        start = end
    yield text[start:] if start else text


def read_rows(path: Path, field: str, errors: str) -> Iterator[str]:
    """Yield the text of each row of a file of rows; a null is an empty text.

    Raises:
        DataError: The file is damaged or has no such field, with the fields there are.
    """
    return _ROW_READERS[suffix_of(path)](path, field, errors)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """Open a file, unzipped, after its byte-order mark; also yield the length of that mark."""
    with readable(path), path.open("rb") as raw:
        is_zipped = path.name.lower().endswith(".gz")
        file: Any = gzip.GzipFile(fileobj=raw) if is_zipped else raw
        offset = 3 if file.read(3) == codecs.BOM_UTF8 else 0
        file.seek(offset)
        yield file, offset


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what goes wrong while reading `path` into a DataError, or 5 without permission."""
    try:
        with storage_errors(path):
            try:
                yield
            except OSError as error:  # what storage_errors would blame on the disk written to
                if isinstance(error, IsADirectoryError):
                    raise DataError(f"{path}: is a folder, not a text file") from error
                if error.errno == errno.ELOOP:
                    raise DataError(f"{path}: a loop of symbolic links") from error
                raise
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


def _not_utf8(path: Path, offset: int) -> DataError:
    return DataError(f"{path}: not UTF-8 at byte {offset}", f"convert the file, or {_REPLACE}")


def _lines(path: Path, errors: str) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, decoded line with its newline)."""
    with _open(path) as (file, offset):
        for number in itertools.count(1):
            if not (raw := file.readline()):
                return
            try:
                yield number, raw.decode("utf-8", errors)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, offset + error.start) from None
            offset += len(raw)


def _no_such_field(path: Path, field: str, fields: list[str]) -> DataError:
    names = ", ".join(map(str, fields[:20])) or "none"
    hint = f"name the one with the text, e.g. -s data.text_field={fields[0]}" if fields else None
    if (form := format_of(fields)) is not None:
        hint = f"these are conversations: -s data.format={form}"
    return DataError(f"{path}: no field '{field}'; the fields are: {names}", hint)


def _json_rows(path: Path, errors: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of each line that is not empty."""
    for number, line in _lines(path, errors):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(f"{path}: line {number} is not JSON ({reason})") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}: line {number} is not a JSON object with fields")
        yield number, row


def _read_jsonl(path: Path, field: str, errors: str) -> Iterator[str]:
    for number, row in _json_rows(path, errors):
        if field not in row:
            raise _no_such_field(path, field, list(row))
        text = "" if row[field] is None else row[field]
        if not isinstance(text, str):
            kind = type(text).__name__
            raise DataError(f"{path}: line {number}: '{field}' is a {kind}, not text")
        yield sound(text, f"{path}: line {number}", errors)


def sound(text: str, where: str, errors: str) -> str:
    """Return a text without halves of surrogate pairs, which JSON can spell.

    Raises:
        DataError: There is one, and `errors` is not "replace".
    """
    try:
        if not text.isascii():
            text.encode("utf-8")
    except UnicodeEncodeError as error:
        if errors != "replace":
            raise DataError(
                f"{where}: unpaired surrogate at character {error.start} (invalid Unicode)",
                f"fix the row, or {_REPLACE}",
            ) from None
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _csv_rows(path: Path, errors: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line number, fields) of each row that is not empty, the header first."""
    csv.field_size_limit(_MAX_FIELD_CHARS)
    rows = csv.reader((line for _, line in _lines(path, errors)), strict=True)
    try:
        for row in rows:
            if row:
                yield rows.line_num, row
    except csv.Error as error:
        hint = "look for a quotation mark that is never closed" if "limit" in str(error) else None
        raise DataError(f"{path}: line {rows.line_num} is not CSV ({error})", hint) from error


def _read_csv(path: Path, field: str, errors: str) -> Iterator[str]:
    header: list[str] = []
    for number, row in _csv_rows(path, errors):
        if not header:
            header = row
            if field not in header:
                raise _no_such_field(path, field, header)
            column = header.index(field)
        elif len(row) <= column:
            raise DataError(
                f"{path}: line {number} has {len(row)} fields, the header {len(header)}"
            )
        else:
            yield row[column]


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """Open a Parquet file; damage is a DataError."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with readable(path):
        path.open("rb").close()  # fails in plainer words than pyarrow's
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                yield file
        except pa.ArrowException as error:
            reason = str(error).splitlines()[0][:120]
            raise DataError(f"{path}: damaged Parquet file ({reason})") from error


def _read_parquet(path: Path, field: str, errors: str) -> Iterator[str]:
    import pyarrow as pa

    with _parquet(path) as file:
        names = file.schema_arrow.names
        if field not in names:
            raise _no_such_field(path, field, names)
        if names.count(field) > 1:
            raise DataError(f"{path}: {names.count(field)} fields are named '{field}'")
        kind = file.schema_arrow.field(field).type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise DataError(f"{path}: field '{field}' is {kind}, not text")
        for number, batch in enumerate(file.iter_batches(1024, columns=[field])):
            yield from _texts_of(batch[0], path, 1024 * number, errors)


def _texts_of(column: Any, path: Path, first_row: int, errors: str) -> Iterator[str]:
    """Yield the texts of an Arrow column, whose bytes need not be UTF-8 whatever its type says."""
    try:
        texts = column.to_pylist()
    except UnicodeDecodeError:
        texts = column.cast("large_binary").to_pylist()
    for row, text in enumerate(texts, first_row):
        try:
            yield (text.decode("utf-8", errors) if isinstance(text, bytes) else text) or ""
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}: row {row}: not UTF-8 at byte {error.start} of its text",
                f"fix the row, or {_REPLACE}",
            ) from None


def read_records(
    path: Path, fields: Sequence[str], optional: Sequence[str], errors: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (place in the file, values by field) of each row of a file of rows.

    Args:
        path: The file.
        fields: Those that every row must have.
        optional: Those that are read where there are such.
        errors: "strict" or "replace", for bytes that are not UTF-8.

    Raises:
        DataError: The file is damaged or has no such field, with the fields there are.
    """
    if suffix_of(path) == ".parquet":
        rows = _parquet_records(path, fields, optional)
    elif suffix_of(path) == ".csv":
        rows = _csv_records(path, errors)
    else:
        rows = ((f"line {number}", row) for number, row in _json_rows(path, errors))
    for place, row in rows:
        for field in fields:
            if field not in row:
                raise _no_such_field(path, field, list(row))
        yield place, row


def _csv_records(path: Path, errors: str) -> Iterator[tuple[str, dict[str, Any]]]:
    header: list[str] = []
    for number, row in _csv_rows(path, errors):
        if len(row) < len(header):
            raise DataError(
                f"{path}: line {number} has {len(row)} fields, the header {len(header)}"
            )
        if header:
            yield f"line {number}", dict(zip(header, row, strict=False))
        header = header or row


def _parquet_records(
    path: Path, fields: Sequence[str], optional: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    with _parquet(path) as file:
        names = file.schema_arrow.names
        for field in fields:
            if field not in names:
                raise _no_such_field(path, field, names)
        columns, first = [name for name in names if name in {*fields, *optional}], 0
        for batch in file.iter_batches(1024, columns=columns):
            try:
                rows = batch.to_pylist()
            except UnicodeDecodeError:
                last = first + len(batch) - 1
                raise DataError(f"{path}: rows {first} to {last} are not all UTF-8") from None
            yield from ((f"row {number}", row) for number, row in enumerate(rows, first))
            first += len(batch)


def fields_of(path: Path) -> list[str]:
    """Return the fields of a file of rows, of its first row where they may differ."""
    if suffix_of(path) == ".parquet":
        with _parquet(path) as file:
            return list(file.schema_arrow.names)
    rows = _csv_rows if suffix_of(path) == ".csv" else _json_rows
    return next((list(row) for _, row in rows(path, "replace")), [])


_ROW_READERS = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
ROW_SUFFIXES = tuple(_ROW_READERS)
SUFFIXES = (".txt", ".md", ".py", *ROW_SUFFIXES)


def parquet_text_bytes(path: Path, field: str) -> int | None:
    """Return the bytes of a Parquet file's texts by its footer, None if it is damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
    except (pa.ArrowException, OSError):
        return None
    total = 0
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        columns = (group.column(number) for number in range(group.num_columns))
        total += sum(c.total_uncompressed_size for c in columns if c.path_in_schema == field)
    return total
