"""Files and folders: what is in them, copies that keep links, damage, and text to put in."""

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from gptcli.data.shards import Manifest
from gptcli.errors import GptError

Write = Callable[..., Path]
Prepared = Callable[..., Manifest]
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


def as_jsonl(rows: Iterable[str]) -> str:
    """Return rows as lines of JSON."""
    return "".join(json.dumps({"text": row}) + "\n" for row in rows)


def sentences(count: int, seed: int = 0) -> str:
    """Return plain text that a tiny model can learn something from."""
    words = "the cat sat on a mat and the dog ran to a big red barn by the sea".split()
    lines = []
    state = seed * 7919 + 1
    for _ in range(count):
        picked = []
        for _ in range(8):
            state = (state * 1103515245 + 12345) % 2**31
            picked.append(words[state // 65536 % len(words)])
        lines.append(" ".join(picked).capitalize() + ".\n")
    return "".join(lines)
