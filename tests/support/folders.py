"""Files and folders: what is in them, copies that keep links, damage, and text to put in."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gptcli.errors import GptError

if TYPE_CHECKING:
    from gptcli.data.shards import Manifest

Write = Callable[..., Path]
Prepared = Callable[..., "Manifest"]
Refusal = Callable[..., GptError]
TokensOf = Callable[..., list[int]]
Encoded = Callable[..., list[int]]


class Usage(NamedTuple):
    """What shutil.disk_usage returns."""

    total: int
    used: int
    free: int


def content(folder: Path) -> dict[str, bytes]:
    """Return the files below a folder by their names in it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder; names that are one file there are one file here."""
    made: dict[int, Path] = {}

    def copy(file: str, name: str) -> None:
        inode = Path(file).stat().st_ino
        if inode in made:
            os.link(made[inode], name)
        else:
            shutil.copy2(file, name)
            made[inode] = Path(name)

    shutil.copytree(source, target, copy_function=copy)


def put(path: Path, content: bytes) -> None:
    """Make a new file of `path`; others may be links of the old one."""
    path.unlink()
    path.write_bytes(content)


def flip(path: Path, bit: int) -> bytes:
    """Flip a bit of a file, as a new file; return the old content."""
    before = path.read_bytes()
    changed = bytearray(before)
    changed[bit // 8] ^= 1 << bit % 8
    put(path, bytes(changed))
    return before
