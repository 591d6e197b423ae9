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
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Self

from gptcli.atomic import storage_errors
from gptcli.errors import DataError
from gptcli.formatting import size

_FREE_BYTES = 1 << 28  # that any compressed file may expand to
_MOST_TIMES = 1000  # its size: far more than text compresses; gzip of zeros reaches 1,030
_BUFFER_BYTES = 1 << 18
REPLACE = "replace the invalid bytes by U+FFFD with -s data.encoding_errors=replace"
_MAX_HEADER_BYTES = 1 << 16  # of a member's long name and attributes


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
    file = path if isinstance(path, Path) else path.archive
    try:
        with storage_errors(file):
            try:
                yield
            except OSError as error:  # what storage_errors would blame on the disk written to
                if isinstance(error, IsADirectoryError):
                    raise DataError(f"{path}: is a folder, not a text file") from error
                if error.errno == errno.ELOOP:
                    raise DataError(f"{path}: a loop of symbolic links") from error
                raise
            except tarfile.TarError as error:
                message = f"{file}: damaged tar archive ({error})"
                raise DataError(message, "download or pack it again") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error


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

    A DataError comes while it is read: it is damaged, or expands to far more than text does.
    """
    suffix = Path(file.name.lower()).suffix.replace(".tgz", ".gz")
    if suffix not in _OPENERS:
        return raw
    kind, opener = _OPENERS[suffix]
    n_packed = file.stat().st_size if isinstance(file, Path) else file.n_bytes
    limit, n_read = max(_FREE_BYTES, _MOST_TIMES * n_packed), 0
    content: Any = None

    def read(n: int) -> bytes:
        nonlocal content, n_read
        try:
            content = content or opener(raw)
            data: bytes = content.read(n)
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            if getattr(error, "errno", None) is not None:
                raise
            raise DataError(f"{file}: damaged {kind} file ({error})") from error
        n_read += len(data)
        if n_read > limit:
            raise DataError(
                f"{file}: expands to more than {size(limit)}, which text does not",
                "if you trust it, unpack it and prepare what is in it",
            )
        return data

    return io.BufferedReader(_Stream(read), _BUFFER_BYTES)


def tar_members(archive: Path, file: BinaryIO) -> Iterator[Member]:
    """Yield the regular files of a tar archive in their order, without hidden ones.

    Links, devices and folders are skipped. Reads ustar, GNU and pax headers.

    Raises:
        DataError: A member is sparse.
        tarfile.TarError: The archive is damaged or cut short; `readable` makes it a DataError.
    """
    with tarfile.open(
        fileobj=file, mode="r|", tarinfo=_Header, encoding="utf-8", errors="replace"
    ) as tar:
        for header in iter(tar.next, None):
            if header.issparse():
                raise DataError(
                    f"{archive}: {header.name}: sparse files are not read from archives",
                    "unpack the archive and prepare the folder",
                )
            is_link = header.islnk() or header.issym()
            if not is_link and (content := tar.extractfile(header)):  # not a folder or device
                if header.isreg() and not _is_hidden(header.name):
                    stream = io.BufferedReader(_Stream(content.read), _BUFFER_BYTES)
                    yield Member(archive, header.name, header.size, stream)
                while content.read(_BUFFER_BYTES):
                    pass  # to its end, which tarfile would seek without noticing that it is cut
            tar.members, tar.pax_headers = [], {}  # type: ignore[attr-defined] # else they grow


class _Header(tarfile.TarInfo):
    """A header of a member. An invalid one is an error, where tarfile takes it for the end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        block = buf if buf.strip(b"\0") else bytes(tarfile.BLOCKSIZE)  # the end mark may be missing
        header = super().frombuf(block, encoding, errors)
        is_name = header.type in b"xXgLK"  # or attributes, which tarfile reads at once
        if header.size < 0 or (is_name and header.size > _MAX_HEADER_BYTES):
            raise tarfile.ReadError(f"a member or a name of {header.size:,} bytes")
        return header

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        assert tar.fileobj is not None
        if (n_bytes := tar.fileobj.tell() - tar.offset) > _MAX_HEADER_BYTES:  # of one member
            raise tarfile.ReadError(f"names of {n_bytes:,} bytes")
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except (tarfile.HeaderError, ValueError, RecursionError) as error:
            raise tarfile.ReadError(str(error)) from error

    def _proc_sparse(self, *_: Any) -> Self:  # its map can be of any length
        self.sparse = b""
        return self

    def _proc_gnusparse_10(self, member: Any, *_: Any) -> None:
        member.sparse = b""


def _is_hidden(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return path.endswith("/") or any(p.startswith(".") and p.strip(".") for p in parts)
