"""Who may write in a folder: a lock that ends with its process, however that ends.

The lock file names its holder and is removed when the last holder lets go. Knows nothing of what
else is in the folder.
"""

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from gptcli import atomic
from gptcli.errors import RunLockedError, StorageError

LOCK = ".lock"


@contextlib.contextmanager
def hold(folder: Path, doing: str, hint: str, *, shared: bool = False) -> Iterator[None]:
    """Hold a folder that exists, alone or together with all others that share it.

    A shared folder that may not be written, or whose file system has no locks, is not held. The
    message to others says what the holder is doing: "is training in this folder".

    Raises:
        RunLockedError: Another process holds it.
        StorageError: It may not be written.
    """
    path = folder / LOCK
    try:
        with atomic.storage_errors(path):
            lock = _acquire(path, shared)
    except (StorageError, OSError) as error:
        if shared:
            yield
            return
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"{path}: cannot be locked: {error.strerror}") from error
    if lock is None:
        holder = "another process"
        with contextlib.suppress(OSError, ValueError), path.open("rb") as file:
            pid, host = file.read(300).decode().split()
            holder = f"process {pid} on {host}"
        raise RunLockedError(f"{folder}: {holder} {doing}", hint)
    try:
        yield
    finally:
        _release(path, lock)


if sys.platform == "win32":
    import filelock

    def _acquire(path: Path, shared: bool) -> "filelock.FileLock | None":
        """Lock a file; shared locks, which Windows' library does not have, lock nothing."""
        if shared:
            raise OSError(errno.ENOSYS, "no shared locks")
        lock = filelock.FileLock(path)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            return None
        return lock

    def _release(path: Path, lock: "filelock.FileLock") -> None:
        lock.release()

else:
    import fcntl

    def _acquire(path: Path, shared: bool) -> int | None:
        """Return the descriptor of the locked file, or None if another process holds it."""
        mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        while True:
            lock = os.open(path, flags, 0o666)
            try:
                fcntl.flock(lock, mode | fcntl.LOCK_NB)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(path.stat(), os.fstat(lock)):
                        with contextlib.suppress(OSError):  # a full disk; the lock holds anyway
                            os.ftruncate(lock, 0)
                            os.pwrite(lock, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
                        return lock
            except BlockingIOError:
                os.close(lock)
                return None
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)  # its last holder has just removed the file: make another

    def _release(path: Path, lock: int) -> None:
        with contextlib.suppress(OSError):  # others share it: the last one removes the file
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        os.close(lock)
