"""Read documents from files: text, rows (jsonl, csv, Parquet); compressed, or in archives.

A document is read in pieces, cut only where every tokenizer would split, so memory stays bounded
for any file size.
"""

import codecs
import csv
import itertools
import json
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gptcli.data import columns
from gptcli.data.archives import REPLACE, File, open_file, readable, shown, suffix_of, tar_members
from gptcli.data.columns import Row, no_such_field
from gptcli.errors import DataError
from gptcli.formatting import size

_BLOCK_BYTES = 4 << 20
_MAX_HELD = 4 << 20  # characters without a safe place to cut, before the text is cut anywhere
_MAX_FIELD_CHARS = 1 << 26  # of CSV; more is a quotation mark that is never closed
_MAX_LINE_BYTES = 1 << 29


# What people bring that is not text, and a command that makes text of it.
CONVERTERS = {
    **dict.fromkeys(
        (".docx", ".odt", ".rtf", ".epub", ".html"), "pandoc {} -t plain --wrap=none -o text.txt"
    ),
    ".pdf": "pdftotext -enc UTF-8 {} text.txt, then look at the text",
    ".doc": "libreoffice --headless --convert-to txt:Text {}",
    ".mobi": "ebook-convert {} text.txt",
    ".azw3": "ebook-convert {} text.txt",
    ".zip": "unzip {} -d folder, then prepare the folder",
    ".7z": "7z x {} -ofolder, then prepare the folder",
    ".rar": "unrar x {} folder/, then prepare the folder",
}


def files_in(path: Path) -> Iterator[File]:
    """Yield a file, or the members of an archive that can be read, one after the other.

    Raises:
        DataError: No file can be read, or one is of a kind that has to be unpacked.
    """
    if suffix_of(path) not in ARCHIVES:
        yield path
        return
    others: dict[str, None] = {}
    is_empty = True
    with open_file(path) as (file, _):
        for member in tar_members(path, file):
            suffix = suffix_of(member)
            if suffix not in SUFFIXES:
                others[suffix or member.name] = None
                continue
            if suffix in (*columns.SUFFIXES, *ARCHIVES):
                raise DataError(
                    f"{member}: {suffix} files are not read from archives",
                    "unpack the archive and prepare the folder",
                )
            is_empty = False
            yield member
    if is_empty:
        found = ", ".join(list(others)[:8]) or "nothing"
        raise DataError(f"{path}: no text in this archive, only {found}", f"looked for {_KNOWN}")


def read_text(path: File, errors: str, cut: re.Pattern[str]) -> Iterator[str]:
    """Yield a text file, which is one document, in pieces; an empty file is one empty piece.

    Args:
        path: The file; its newlines are kept as they are, a byte-order mark is not.
        errors: "strict" or "replace", for bytes that are not UTF-8.
        cut: Matches where the text may be cut.

    Raises:
        DataError: The file cannot be read or is not UTF-8, with the byte offset.
    """
    held, is_empty = "", True
    with readable(path):
        for block in _decoded(path, errors):
            held += block
            at = _last_cut(held, cut)
            if not at and len(held) >= _MAX_HELD:
                at = len(held)  # no word ends in all of it; memory comes first
            if at:
                yield held[:at]
                held, is_empty = held[at:], False
    if held or is_empty:
        yield held


def _decoded(path: File, errors: str) -> Iterator[str]:
    """Yield a text file block by block, the last ones as far as they are decoded."""
    if (command := CONVERTERS.get(suffix_of(path))) is not None:
        name = shlex.quote(shown(path.name))
        raise DataError(
            f"{path}: {suffix_of(path)} files are not read", f"convert it: {command.format(name)}"
        )
    with open_file(path) as (file, offset):
        decoder = codecs.getincrementaldecoder("utf-8")(errors)
        while True:
            block = file.read(_BLOCK_BYTES)
            # The decoder keeps up to three bytes of a character that the last block cut.
            n_kept = len(decoder.getstate()[0])
            try:
                yield decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, offset - n_kept + error.start) from None
            if not block:
                return
            offset += len(block)


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


def read_rows(path: File, field: str, errors: str) -> Iterator[str]:
    """Yield the text of each row, read by `read_records`; a null is an empty text."""
    for place, row in read_records(path, [field], (), errors):
        text = "" if row[field] is None else row[field]
        if not isinstance(text, str):
            raise DataError(f"{path}: {place}: '{field}' is a {type(text).__name__}, not text")
        yield sound(text, f"{path}: {place}", errors)


def read_records(
    path: File, fields: Sequence[str], optional: Sequence[str], errors: str
) -> Iterator[Row]:
    """Yield each row of a file of rows.

    Args:
        path: The file.
        fields: Those that every row must have.
        optional: Those that are read where there are such.
        errors: "strict" or "replace", for bytes that are not UTF-8.

    Raises:
        DataError: The file is damaged or has no such field, with the fields there are.
    """
    for place, row in _ROW_READERS[suffix_of(path)](path, [*fields, *optional], errors):
        for field in fields:
            if field not in row:
                is_table = suffix_of(path) in columns.SUFFIXES
                raise no_such_field(path, field, columns.fields_of(path) if is_table else [*row])
        yield place, row


def _not_utf8(path: File, offset: int) -> DataError:
    return DataError(f"{path}: not UTF-8 at byte {offset}", f"convert the file, or {REPLACE}")


def _lines(path: File, errors: str) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, decoded line with its newline)."""
    with open_file(path) as (file, offset):
        for number in itertools.count(1):
            if not (raw := file.readline(_MAX_LINE_BYTES)):
                return
            if len(raw) == _MAX_LINE_BYTES:
                raise DataError(f"{path}: line {number} has more than {size(_MAX_LINE_BYTES)}")
            try:
                yield number, raw.decode("utf-8", errors)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, offset + error.start) from None
            offset += len(raw)


def _read_jsonl(path: File, fields: Sequence[str], errors: str) -> Iterator[Row]:
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
        yield f"line {number}", row


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
                f"fix the row, or {REPLACE}",
            ) from None
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _read_csv(path: File, fields: Sequence[str], errors: str) -> Iterator[Row]:
    csv.field_size_limit(_MAX_FIELD_CHARS)
    rows = csv.reader((line for _, line in _lines(path, errors)), strict=True)
    header: list[str] = []
    try:
        for row in filter(None, rows):
            if not {*fields}.isdisjoint(header[len(row) :]):
                where = f"{path}: line {rows.line_num}"
                raise DataError(f"{where} has {len(row)} fields, the header {len(header)}")
            if header:
                values = itertools.zip_longest(header, row[: len(header)])
                yield f"line {rows.line_num}", dict(values)
            header = header or row
    except csv.Error as error:
        hint = "look for a quotation mark that is never closed" if "limit" in str(error) else None
        raise DataError(f"{path}: line {rows.line_num} is not CSV ({error})", hint) from error


def fields_of(path: Path) -> list[str]:
    """Return the fields of a file of rows, of its first row where they may differ."""
    if suffix_of(path) in columns.SUFFIXES:
        return columns.fields_of(path)
    for file in files_in(path):
        read = _ROW_READERS.get(suffix_of(file))
        return next((list(row) for _, row in read(file, (), "replace")), []) if read else []
    return []


_ROW_READERS: dict[str, Callable[[File, Sequence[str], str], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    **dict.fromkeys(columns.SUFFIXES, columns.read_records),
}
ROW_SUFFIXES = tuple(_ROW_READERS)
ARCHIVES = (".tar",)
SUFFIXES = (".txt", ".md", ".py", *ROW_SUFFIXES, *ARCHIVES)
_KNOWN = " ".join(SUFFIXES)


def holds_documents(path: File) -> bool:
    """Tell whether a file may hold several documents: rows, or the members of an archive."""
    return suffix_of(path) in (*ROW_SUFFIXES, *ARCHIVES)
