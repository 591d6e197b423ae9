"""Files appear whole or not at all, and what fails leaves the old content and no debris."""

import contextlib
import errno
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from gptcli import atomic
from gptcli.errors import StorageError

posix_only = pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit or user")


@contextlib.contextmanager
def without_privileges() -> Iterator[None]:
    """Be an ordinary user, whom permissions stop."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def names(folder: Path) -> list[str]:
    """Return the names in a folder."""
    return sorted(path.name for path in folder.iterdir())


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own."""
    words = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(words, capture_output=True, text=True, timeout=60)


def test_a_file_gets_its_name_when_the_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with atomic.atomic_write(path) as file:
        file.write(b"brand ")
        file.write(b"new")
        file.seek(0)
        file.write(b"B")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"Brand new"
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit, OSError])
def test_an_error_in_the_block_keeps_the_old_file(
    tmp_path: Path, kind: type[BaseException]
) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(kind), atomic.atomic_write(path) as file:
        file.write(b"new" * 10_000)
        raise kind
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["x"]


def test_an_error_in_the_block_makes_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError), atomic.atomic_write(tmp_path / "x") as file:
        file.write(b"new")
        raise ValueError
    assert names(tmp_path) == []


def test_content_is_flushed_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut after the rename must not show an empty file, nor forget the name."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        is_folder = stat.S_ISDIR(status.st_mode)
        calls.append("fsync folder" if is_folder else f"fsync {status.st_size}")
        fsync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    atomic.write_bytes(tmp_path / "x", b"12345")
    assert calls == ["fsync 5", "replace"] + ["fsync folder"] * (os.name != "nt")


LIMITED = """
import resource, sys
from pathlib import Path
from gptcli import atomic
from gptcli.errors import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
path, how = Path(sys.argv[1]), sys.argv[2]
try:
    with atomic.atomic_write(path) as file:
        try:
            for size in {"at once": [1000] * 1000, "late": [5000], "hidden": [10**6]}[how]:
                file.write(bytes(size))
        except OSError:
            if how == "hidden":
                raise RuntimeError("unexpected pos 576 vs 534")  # as torch.save does
            raise
except StorageError as error:
    print(error.exit_code, error.message, error.hint, sep="|")
"""


@posix_only
@pytest.mark.parametrize("how", ["at once", "late", "hidden"])
def test_a_full_disk_keeps_the_old_file(tmp_path: Path, how: str) -> None:
    """The largest file size allowed stands in for the disk; "late" fails at the last flush."""
    path = tmp_path / "x"
    path.write_bytes(b"old")
    done = run_python(LIMITED, path, how)
    assert done.stderr == ""
    code, message, hint = done.stdout.split("|")
    assert code == "5"
    assert message.endswith("x: File too large")
    assert "free space on that disk" in hint
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["x"]


@posix_only
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    (folder / "x").write_bytes(b"old")
    folder.chmod(0o555)
    with without_privileges(), pytest.raises(StorageError, match="x: Permission denied") as caught:
        atomic.write_bytes(folder / "x", b"new")
    assert caught.value.exit_code == 5
    assert (folder / "x").read_bytes() == b"old"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_says_how_much_is_free(tmp_path: Path, number: int) -> None:
    with (
        pytest.raises(StorageError, match=r"x: ") as caught,
        atomic.storage_errors(tmp_path / "x"),
    ):
        raise OSError(number, os.strerror(number))
    assert (caught.value.hint or "").endswith("B free)")


def test_the_free_space_is_that_of_the_disk_that_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {tmp_path: 7_000, tmp_path.parent: 9_000}
    monkeypatch.setattr(atomic.shutil, "disk_usage", lambda path: SimpleNamespace(free=free[path]))
    for path in (tmp_path / "x", tmp_path, tmp_path / "none" / "x"):
        with pytest.raises(StorageError) as caught, atomic.storage_errors(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        assert (caught.value.hint or "").endswith("(7 kB free)")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_refused_write_names_the_file_of_the_error(tmp_path: Path, number: int) -> None:
    with pytest.raises(StorageError, match=r"^/other: "), atomic.storage_errors(tmp_path / "x"):
        raise OSError(number, os.strerror(number), "/other")


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic.storage_errors(tmp_path):
        (tmp_path / "missing").read_bytes()


def test_a_killed_process_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    code = (
        "import os, sys; from pathlib import Path; from gptcli import atomic\n"
        "with atomic.atomic_write(Path(sys.argv[1])) as file: file.write(bytes(10**6)); os._exit(9)"
    )
    assert run_python(code, path).returncode == 9
    assert path.read_bytes() == b"old"
    assert len(names(tmp_path)) == 2
    atomic.remove_leftovers(tmp_path)
    assert names(tmp_path) == ["x"]


def test_leftovers_are_only_our_own_files(tmp_path: Path) -> None:
    kept = [".tmp-x", ".tmp-12", "tmp-1-x", ".hidden", "a.tmp-1-x", "x"]
    for name in (*kept, ".tmp-1-x", ".tmp-4711-best.pt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / ".tmp-1-folder").mkdir()
    atomic.remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted([*kept, ".tmp-1-folder"])


def test_a_link_is_another_name_of_the_file(tmp_path: Path) -> None:
    source, best = tmp_path / "step-1.pt", tmp_path / "best.pt"
    source.write_bytes(b"1")
    atomic.link(source, best)
    assert best.read_bytes() == b"1"
    assert best.samefile(source)
    assert names(tmp_path) == ["best.pt", "step-1.pt"]


def test_linking_twice_leaves_nothing_else(tmp_path: Path) -> None:
    source, best = tmp_path / "step-1.pt", tmp_path / "best.pt"
    source.write_bytes(b"1")
    atomic.link(source, best)
    atomic.link(source, best)
    assert best.samefile(source)
    assert names(tmp_path) == ["best.pt", "step-1.pt"]


def test_a_link_moves_to_another_file(tmp_path: Path) -> None:
    first, second, best = (tmp_path / name for name in ("1.pt", "2.pt", "best.pt"))
    first.write_bytes(b"1")
    second.write_bytes(b"2")
    atomic.link(first, best)
    atomic.link(second, best)
    assert best.samefile(second)
    assert first.read_bytes() == b"1"
    assert names(tmp_path) == ["1.pt", "2.pt", "best.pt"]


def test_where_links_fail_there_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "no links on this file system")

    monkeypatch.setattr(os, "link", no_links)
    source, best = tmp_path / "step-1.pt", tmp_path / "best.pt"
    source.write_bytes(b"1")
    best.write_bytes(b"0")
    atomic.link(source, best)
    assert best.read_bytes() == b"1"
    assert not best.samefile(source)
    assert names(tmp_path) == ["best.pt", "step-1.pt"]


def test_folders_are_made_with_their_parents(tmp_path: Path) -> None:
    atomic.make_folder(tmp_path / "a" / "b" / "c")
    atomic.make_folder(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()


@pytest.mark.parametrize("below", ["", "deeper", "deeper/still"])
def test_a_file_in_the_way_of_a_folder_is_named(tmp_path: Path, below: str) -> None:
    (tmp_path / "x").write_bytes(b"a file")
    with pytest.raises(StorageError, match="expected a folder, found a file"):
        atomic.make_folder(tmp_path / "x" / below)
    assert (tmp_path / "x").read_bytes() == b"a file"


def test_a_file_can_be_flushed_by_name(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"kept")
    atomic.sync_file(tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == b"kept"


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder that takes nothing")
def test_a_place_that_takes_nothing_is_said() -> None:
    with pytest.raises(StorageError, match="/proc/new: cannot create files there"):
        atomic.make_folder(Path("/proc/new"))


@posix_only
@pytest.mark.parametrize("name", [b"x" * 255, b"\xff", "\u00e9".encode() * 127])
def test_every_name_that_a_file_can_have_is_written(tmp_path: Path, name: bytes) -> None:
    path = tmp_path / os.fsdecode(name)
    if name == b"\xff" and sys.platform == "darwin":
        pytest.skip("names are text there")
    atomic.write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    with atomic.atomic_write(path) as file:
        [aside] = set(names(tmp_path)) - {path.name}
        assert aside.isascii() and Path(aside).suffix
        file.write(b"newer")
    assert names(tmp_path) == [path.name]


@posix_only
@pytest.mark.parametrize("name", ["x" * 256, "", ".", "..", "file/x", "\u00e9" * 128])
def test_a_name_that_no_file_can_have_is_said(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=r"^/"):
        atomic.write_bytes(tmp_path / "folder" / ".." / name, b"new")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError) as caught:
        atomic.write_bytes(tmp_path / "folder" / ".." / name, b"new")
    assert ".tmp-" not in caught.value.message
    assert names(tmp_path) == ["file", "folder"]


@posix_only
def test_nobody_waits_for_whoever_reads_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(StorageError, match="pipe: "):
        atomic.append(pipe, "line\n")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(StorageError, match="pipe: not a regular file"):
        atomic.append(pipe, "line\n")
    os.close(reader)
    with pytest.raises(OSError, match="not a regular file"):
        atomic.read_bytes(pipe)
