"""The one writer of files that must survive a crash or a power cut.

A file is written aside, flushed to the disk, renamed over its name, and the folder is flushed:
a reader sees the old content or the new, never a part. Knows nothing of what is in the files.
"""

import contextlib
import errno
import io
import os
import re
import shutil
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from gptcli.errors import ConfigError, StorageError
from gptcli.formatting import size

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_TOO_MANY_FILES = {errno.EMFILE, errno.ENFILE}
_ASIDE = re.compile(r"\.tmp-\d+-")


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a missing permission or a limit into a `StorageError`, naming `path`."""
    try:
        yield
    except OSError as error:
        named = Path(os.fsdecode(error.filename)) if error.filename else path
        if _ASIDE.match(named.name):
            named = path  # the name that was asked for
        if error.errno in _FULL:
            hint = "free space on that disk and run the same command again"
            with contextlib.suppress(OSError):
                hint += f" ({size(shutil.disk_usage(existing_folder(path)).free)} free)"
            raise StorageError(f"{named}: {error.strerror}", hint) from error
        if error.errno in _DENIED:
            raise StorageError(f"{named}: {error.strerror}") from error
        if error.errno in _TOO_MANY_FILES:
            raise StorageError("too many open files", "raise the limit: ulimit -n 4096") from error
        if error.errno == errno.ELOOP:
            raise StorageError(f"{named}: is a link, and links are not written through") from error
        if isinstance(error, FileExistsError | NotADirectoryError):
            raise StorageError(f"{named}: expected a folder, found a file") from error
        if isinstance(error, IsADirectoryError):
            raise StorageError(
                f"{path}: is a folder, not a file", "move it away and run the same command again"
            ) from error
        raise


@contextlib.contextmanager
def create_errors(path: Path) -> Iterator[None]:
    """Like `storage_errors`, for writing: every system error becomes a StorageError."""
    try:
        with storage_errors(path):
            yield
    except FileNotFoundError as error:
        gone = next((folder for folder in reversed(path.parents) if not is_folder(folder)), None)
        if gone is None:
            raise StorageError(f"{path}: cannot create files there ({error.strerror})") from error
        raise StorageError(f"{gone}: no such folder; cannot create files there") from error
    except OSError as error:
        if error.errno is None:  # a library's, not the system's
            raise
        raise StorageError(f"{path}: {error.strerror}") from error


def existing_folder(path: Path) -> Path:
    """Return `path` if it is a folder, else the nearest one above it."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


class _Remembering(io.BufferedWriter):
    """A file that keeps the first error of a write, which torch.save hides behind its own."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.error = self.error or error
            raise


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes `path`'s place, whole and on the disk, when the block ends.

    If the block raises, `path` keeps what it had and nothing is left behind.

    Raises:
        StorageError: The disk is full or the folder may not be written.
    """
    aside = aside_name(path)
    with create_errors(path):
        try:
            aside.unlink(missing_ok=True)
            with _Remembering(io.FileIO(aside, "xb")) as file:  # never through a link of this name
                try:
                    yield file
                except Exception:
                    if file.error is not None:
                        raise file.error from None
                    raise
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                aside.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)


def aside_name(path: Path) -> Path:
    """Return the name a file is written under before it is complete."""
    # Short and plain whatever `path` is called: a name of 255 bytes has room for no more, and not
    # every library takes one that is not text, or has no suffix (torch).
    mark = zlib.crc32(os.fsencode(path.name))
    return path.parent / f".tmp-{os.getpid()}-{mark:08x}.part"


def require_free(out: Path, force: bool, *, is_folder: bool = False) -> None:
    """Refuse a name that is taken, or that no file (or folder) can have.

    Raises:
        ConfigError: It exists and `force` is not set, or it is not a valid name.
        StorageError: Its folder may not be read.
    """
    if out.name in ("", ".."):
        raise ConfigError(f"OUT: '{out}' is not a valid name", "name a new folder or file")
    with create_errors(out):
        exists = out.exists()
    if not is_folder and out.is_dir():
        raise ConfigError(f"{out} is a folder; name the file to write in it")
    if not exists or force or (is_folder and out.is_dir() and not any(out.iterdir())):
        return
    what = "is not empty" if out.is_dir() else "exists"
    raise ConfigError(
        f"{out} {what}", f"choose another path, or rename the old one to {out.name}~1 with --force"
    )


def set_aside(path: Path) -> None:
    """Rename a file or folder to the first free `<name>~N`."""
    number = 1
    while (aside := path.with_name(f"{path.name}~{number}")).exists():
        number += 1
    with storage_errors(path):
        path.rename(aside)


def write_bytes(path: Path, data: bytes) -> None:
    """Make `data` the content of `path`, all of it or not at all."""
    with atomic_write(path) as file:
        file.write(data)


def append(path: Path, text: str) -> None:
    """Add a line to a file, never through a link; it is on the disk after `sync_file`."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe would wait
    with create_errors(path), os.fdopen(os.open(path, flags, 0o666), "wb") as file:
        _require_file(path, os.fstat(file.fileno()).st_mode)
        file.write(text.encode())


def link(source: Path, path: Path) -> None:
    """Make `path` another name of the file `source`, or a copy where links are not possible."""
    aside = aside_name(path)
    with create_errors(path):
        aside.unlink(missing_ok=True)
        try:
            os.link(source, aside)
        except OSError:
            with source.open("rb") as content, atomic_write(path) as copy:
                shutil.copyfileobj(content, copy, 1 << 20)
            return
        os.replace(aside, path)
        # Replacing a name by another name of the same file does nothing and leaves both.
        aside.unlink(missing_ok=True)
        sync_folder(path.parent)


def is_file(path: Path) -> bool:
    """Tell whether there is a file, also of a name that no file can have."""
    return os.path.isfile(path)  # noqa: PTH113  # Path.is_file raises for such a name


def is_folder(path: Path) -> bool:
    """Tell whether there is a folder, also of a name that no folder can have."""
    return os.path.isdir(path)  # noqa: PTH112


def read_bytes(path: Path) -> bytes:
    """Return a file's content; an OSError for a pipe or a device, which may have no end."""
    _require_file(path, path.stat().st_mode)
    return path.read_bytes()


def _require_file(path: Path, mode: int) -> None:
    """Refuse what is neither a file nor a folder, which fails by itself."""
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


@contextlib.contextmanager
def held(path: Path) -> Iterator[Path]:
    """Yield a name that stays this file's, for readers that open a name more than once."""
    # `path` itself may become another file between two opens; where files have no second name
    # (Windows) one that is open cannot be replaced.
    with path.open("rb") as file:
        name = Path(f"/dev/fd/{file.fileno()}")
        yield name if name.exists() else path


def make_folder(path: Path) -> None:
    """Make a folder and its parents, which survive a power cut."""
    with create_errors(path):
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            sync_folder(folder.parent)


def sync_file(path: Path) -> None:
    """Flush a file's content and its name, which may be new, to the disk."""
    with create_errors(path):
        with path.open("r+b") as file:
            os.fsync(file.fileno())
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's names to the disk; a no-op where folders cannot be opened (Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove what an interrupted `atomic_write` or `link` left in `folder`."""
    for path in folder.iterdir():
        if _ASIDE.match(path.name) and not path.is_dir():
            path.unlink(missing_ok=True)
