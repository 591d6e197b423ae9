"""One holder of a folder at a time, named to the others; nothing outlives its process."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from gptcli.errors import RunLockedError, StorageError
from gptcli.locking import LOCK, hold

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no shared locks")
HOLDS = """
import sys, time
from pathlib import Path
from gptcli.locking import hold
with hold(Path(sys.argv[1]), "works here", ""):
    print("held", flush=True)
    time.sleep(60)
"""


def holding(folder: Path, shared: bool = False) -> AbstractContextManager[None]:
    """Hold a folder as two of the same kind do."""
    return hold(folder, "works here", "wait", shared=shared)


@posix_only
def test_another_process_is_named_and_its_lock_ends_with_it(tmp_path: Path) -> None:
    words = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(RunLockedError, match=rf": process {other.pid} on \S+ works here$"):
            holding(tmp_path).__enter__()
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert (tmp_path / LOCK).exists()
    with holding(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@posix_only
def test_those_that_share_a_folder_keep_out_who_wants_it_alone(tmp_path: Path) -> None:
    with holding(tmp_path, shared=True):
        with holding(tmp_path, shared=True), pytest.raises(RunLockedError):
            holding(tmp_path).__enter__()
        with pytest.raises(RunLockedError):  # the first is still there
            holding(tmp_path).__enter__()
    with holding(tmp_path), pytest.raises(RunLockedError):
        holding(tmp_path, shared=True).__enter__()
    assert list(tmp_path.iterdir()) == []


@posix_only
def test_no_two_hold_a_folder_while_its_lock_comes_and_goes(tmp_path: Path) -> None:
    """Each writes its id and reads it back; the lock file is made and removed all the while."""
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = 0 if hold_often(tmp_path, 300) else 2
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0] * 4
    assert not (tmp_path / LOCK).exists()


def hold_often(folder: Path, times: int) -> bool:
    """Hold a folder many times; tell whether nobody else was ever there."""
    note, mine = folder / "note", str(os.getpid())
    while times:
        try:
            with holding(folder):
                times -= 1
                note.write_text(mine)
                os.sched_yield()
                if note.read_text() != mine:
                    return False
        except RunLockedError:
            os.sched_yield()
    return True


@posix_only
def test_a_folder_that_may_not_be_written_is_shared_but_never_held(
    tmp_path: Path, without_privileges: Callable[[], AbstractContextManager[None]]
) -> None:
    tmp_path.chmod(0o555)
    with without_privileges():
        with holding(tmp_path, shared=True):
            pass
        with pytest.raises(StorageError, match="Permission denied"):
            holding(tmp_path).__enter__()


@posix_only
def test_a_lock_that_is_no_file_is_an_error_of_the_disk(tmp_path: Path) -> None:
    (tmp_path / LOCK).mkdir()
    with pytest.raises(StorageError, match=f"{LOCK}: is a folder, not a file"):
        holding(tmp_path).__enter__()
    (tmp_path / LOCK).rmdir()
    (tmp_path / LOCK).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="links are not written through"):
        holding(tmp_path).__enter__()
    assert not (tmp_path / "elsewhere").exists()
