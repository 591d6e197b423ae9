"""Files inside files: compressed text and the members of tar archives, read as streams.

Nothing is unpacked to the disk, so no name in an archive can lead anywhere. What a small file may
expand to is bounded. Knows nothing of what is in the text.
"""

import bz2
import codecs
import contextlib
import errno
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from gptcli.atomic import storage_errors
from gptcli.errors import DataError
from gptcli.formatting import size

_FREE_BYTES = 1 << 28  # that any compressed file may expand to
_MOST_TIMES = 1000  # its size: far more than text compresses; gzip of zeros reaches 1,030
_BUFFER_BYTES = 1 << 18
_BLOCK = 512  # of tar
REPLACE = "replace the invalid bytes by U+FFFD with -s data.encoding_errors=replace"
_MAX_HEADER_BYTES = 1 << 20  # of a member's long name and attributes


@dataclass(frozen=True)
class Member:
    """A regular file in an archive, which can be read until the next one is asked for."""

    archive: Path
    path: str
    n_bytes: int
    content: BinaryIO

    @property
    def name(self) -> str:
        """Its name without folders."""
        return PurePosixPath(self.path).name

    def __str__(self) -> str:
        return f"{self.archive}: {self.path}"

    def open(self, mode: str) -> contextlib.AbstractContextManager[BinaryIO]:
        """Return its content, as a file that is opened does."""
        assert mode == "rb"
        return contextlib.nullcontext(self.content)


File = Path | Member


def _unzstd(file: BinaryIO) -> Any:
    import pyarrow  # which brings zstd; Python has it from 3.14 on

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")


_OPENERS: dict[str, tuple[str, Callable[[BinaryIO], Any]]] = {
    ".gz": ("gzip", lambda file: gzip.GzipFile(fileobj=file)),
    ".bz2": ("bzip2", bz2.BZ2File),
    ".xz": ("xz", lzma.LZMAFile),
    ".zst": ("zstd", _unzstd),
}
COMPRESSED = tuple(_OPENERS)


def bare_name(name: str) -> str:
    """Return a file's name without the suffix of its compression."""
    if name.lower().endswith(".tgz"):
        return name[:-4] + ".tar"
    return next((name[: -len(s)] for s in COMPRESSED if name.lower().endswith(s)), name)


def suffix_of(path: File) -> str:
    """Return the file's kind: its last suffix, without that of a compression after it."""
    return Path(bare_name(path.name)).suffix.lower()


def shown(path: str | Path) -> str:
    """Return a name as text; bytes of it that are not UTF-8 become U+FFFD."""
    return os.fsencode(path).decode("utf-8", "replace")


@contextlib.contextmanager
def open_file(path: File) -> Iterator[tuple[BinaryIO, int]]:
    """Open a file, uncompressed, after its byte-order mark; also yield the length of that mark."""
    with readable(path), path.open("rb") as raw:
        file: Any = uncompressed(path, raw)
        offset = 3 if file.peek(3)[:3] == codecs.BOM_UTF8 else 0
        file.read(offset)
        yield file, offset


@contextlib.contextmanager
def readable(path: File) -> Iterator[None]:
    """Turn what goes wrong while reading `path` into a DataError, or 5 without permission."""
    try:
        with storage_errors(path if isinstance(path, Path) else path.archive):
            try:
                yield
            except OSError as error:  # what storage_errors would blame on the disk written to
                if isinstance(error, IsADirectoryError):
                    raise DataError(f"{path}: is a folder, not a text file") from error
                if error.errno == errno.ELOOP:
                    raise DataError(f"{path}: a loop of symbolic links") from error
                raise
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


class Reading:
    """Counts what a file expands to."""

    def __init__(self, file: File, n_packed: int) -> None:
        self._file, self._n_read = file, 0
        self._limit = max(_FREE_BYTES, _MOST_TIMES * n_packed)

    def add(self, n_bytes: int) -> None:
        """Count bytes; refuse, with a DataError, far more than text of the file's size has."""
        self._n_read += n_bytes
        if self._n_read > self._limit:
            raise DataError(
                f"{self._file}: expands to more than {size(self._limit)}, which text does not",
                "if you trust it, unpack it and prepare what is in it",
            )


class _Stream(io.RawIOBase):
    """Bytes that a function returns, at most so many; fewer than asked for are the last."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def uncompressed(file: File, raw: BinaryIO) -> BinaryIO:
    """Return the content of a file that is open, uncompressed if its name says that it is not.

    Raises:
        DataError: While it is read: it is damaged, or expands to far more than text does.
    """
    suffix = Path(file.name.lower()).suffix.replace(".tgz", ".gz")
    if suffix not in _OPENERS:
        return raw
    kind, opener = _OPENERS[suffix]
    reading = Reading(file, file.stat().st_size if isinstance(file, Path) else file.n_bytes)
    content: Any = None

    def read(n: int) -> bytes:
        nonlocal content
        try:
            content = content or opener(raw)
            data: bytes = content.read(n)
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if getattr(error, "errno", None) is not None:
                raise
            raise DataError(f"{file}: damaged {kind} file ({error})") from error
        reading.add(len(data))
        return data

    return io.BufferedReader(_Stream(read), _BUFFER_BYTES)


def tar_members(archive: Path, file: BinaryIO) -> Iterator[Member]:
    """Yield the regular files of a tar archive in their order, without hidden ones.

    Links, devices and folders are skipped. Reads ustar, GNU and pax headers.

    Raises:
        DataError: The archive is damaged or cut short, or a member is sparse.
    """
    for kind, name, n_bytes, is_sparse in _headers(archive, file):
        if is_sparse:
            raise DataError(
                f"{archive}: {name}: sparse files are not read from archives",
                "unpack the archive and prepare the folder",
            )
        if kind not in b"123456":  # which have no content
            content = _Content(archive, file, n_bytes)
            if kind in b"\x0007" and not _is_hidden(name):
                yield Member(archive, name, n_bytes, io.BufferedReader(content, _BUFFER_BYTES))
            content.skip()
            _exactly(archive, file, _padded(n_bytes) - n_bytes)


def _headers(archive: Path, file: BinaryIO) -> Iterator[tuple[bytes, str, int, bool]]:
    """Yield (kind, name, bytes, whether it is sparse) of each member, before its content."""
    name, attributes = "", dict[str, str]()
    while (header := file.read(_BLOCK)).strip(b"\0"):
        if len(header) < _BLOCK or _number(header[148:156]) != _checksum(header):
            raise _damaged(archive, "not the header of a member")
        kind, n_bytes = header[156:157], _number(header[124:136])
        if kind in b"xXgLK":  # about the next member
            if not 0 <= n_bytes <= _MAX_HEADER_BYTES:
                raise _damaged(archive, f"a name of {n_bytes:,} bytes")
            data = _exactly(archive, file, _padded(n_bytes))[:n_bytes]
            if kind in b"xX":
                attributes = _attributes(archive, data)
            elif kind == b"L":
                name = _text(data)
            continue
        prefix = _text(header[345:500]) + "/" if header[257:263] == b"ustar\0" else ""
        name = attributes.get("path") or name or prefix.lstrip("/") + _text(header[:100])
        if attributes.get("size", "").isdecimal():
            n_bytes = int(attributes["size"][:20])
        if n_bytes < 0:
            raise _damaged(archive, f"a member of {n_bytes} bytes")
        is_sparse = kind == b"S" or any(key.startswith("GNU.sparse.") for key in attributes)
        yield kind, name, n_bytes, is_sparse
        name, attributes = "", {}
    if name or attributes:
        raise _damaged(archive, "cut short before a member")


class _Content(io.RawIOBase):
    """What is in a member of an archive, which is read from the archive's own stream."""

    def __init__(self, archive: Path, file: BinaryIO, n_bytes: int) -> None:
        self._archive, self._file, self._left = archive, file, n_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = _exactly(self._archive, self._file, min(len(buffer), self._left))
        buffer[: len(data)] = data
        self._left -= len(data)
        return len(data)

    def skip(self) -> None:
        """Go to its end."""
        while self._left:
            self.readinto(bytearray(min(self._left, _BUFFER_BYTES)))


def _exactly(archive: Path, file: BinaryIO, n: int) -> bytes:
    data = file.read(n)
    if len(data) < n:
        raise _damaged(archive, "cut short in the middle of a member")
    return data


def _damaged(archive: Path, why: str) -> DataError:
    return DataError(f"{archive}: damaged tar archive ({why})", "download or pack it again")


def _padded(n_bytes: int) -> int:
    return -(-n_bytes // _BLOCK) * _BLOCK


def _checksum(header: bytes) -> int:
    return sum(header) - sum(header[148:156]) + 8 * ord(" ")


def _number(field: bytes) -> int:
    """Return a number in octal digits or, from 8 GB on, in binary; -1 if it is neither."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    digits = field.strip(b" \0")
    return int(digits or b"0", 8) if not digits.strip(b"01234567") else -1


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode("utf-8", "replace")


def _attributes(archive: Path, data: bytes) -> dict[str, str]:
    """Return the records of a pax header: `<length> <key>=<value>` and a newline each."""
    found, at = dict[str, str](), 0
    while at < len(data):
        length = data[at : at + 20].partition(b" ")[0]
        end = at + int(length) if length.isdigit() else at
        if not at < end <= len(data):
            raise _damaged(archive, "not the attributes of a member")
        key, _, value = data[at + len(length) + 1 : end].removesuffix(b"\n").partition(b"=")
        found[_text(key)] = _text(value)
        at = end
    return found


def _is_hidden(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return path.endswith("/") or any(p.startswith(".") and p.strip(".") for p in parts)
