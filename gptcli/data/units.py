"""Units of work: groups of files, their documents in a fixed order, and how they are split.

A unit (one rows file, or a group of text files) is prepared on its own and becomes its own shards,
so the output does not depend on who prepares what. Knows nothing of tokens.
"""

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from gptcli.config.schema import DataConfig
from gptcli.data import hub, library, readers
from gptcli.errors import DataError
from gptcli.seeding import derive_uniform
from gptcli.tokenizers import SAFE_CUT

Split = Literal["train", "val"]
SplitRule = Literal["documents", "tail", "end", "train", "val"]

GROUP_BYTES = 32 << 20  # text files are grouped up to this size
FILES_SPLIT_WHOLE = 100  # from here on whole files are held out, below the tail of each
ROWS_DRAWN = 100  # from here on rows are drawn for validation, below the end of each file's is
_MOST_COUNTED_BYTES = 64 << 20  # of rows files that are read to count their rows


@dataclass(frozen=True)
class Unit:
    """One piece of work: files whose documents become shards of their own.

    Attributes:
        index: Its place in the source, and the first number in its shards' names.
        name: What messages call it.
        paths: Local files, or files of the network that are fetched before they are read.
        held_out: How validation is chosen: "documents" by a keyed draw, the "tail" of each
            document's tokens, the "end" of the unit's tokens, or the whole unit is one split.
        joined: The rows are lines of one document (as WikiText's are), not documents.
    """

    index: int
    name: str
    paths: tuple[Path | hub.RemoteFile, ...]
    held_out: SplitRule
    joined: bool = False

    def split_of(self, document: int, seed: int, val_fraction: float) -> Split:
        """Return the split of a document of this unit (of its head, for "tail" and "end")."""
        match self.held_out:
            case "val":
                return "val"
            case "documents":
                drawn = derive_uniform("split", seed, self.index, document)
                return "val" if drawn < val_fraction else "train"
        return "train"


def units_of_files(files: list[Path], config: DataConfig) -> list[Unit]:
    """Group text files, then make each rows file a unit, in the order of the files."""
    is_rows = [readers.suffix_of(file) in readers.ROW_SUFFIXES for file in files]
    texts = [file for file, is_row in zip(files, is_rows, strict=True) if not is_row]
    held_out: SplitRule = "documents" if len(texts) >= FILES_SPLIT_WHOLE else "tail"
    units = [Unit(0, readers.shown(group[0]), group, held_out) for group in _groups(texts)]
    rows = [
        Unit(0, readers.shown(file), (file,), "documents")
        for file, is_row in zip(files, is_rows, strict=True)
        if is_row
    ]
    if _are_few(rows, config):
        rows = [replace(unit, held_out="end") for unit in rows]
    return numbered(units + rows)


def _are_few(units: list[Unit], config: DataConfig) -> bool:
    """Tell whether files hold too few rows for a draw of them to come near its share."""
    if size_of(unit.paths[0] for unit in units) > _MOST_COUNTED_BYTES:  # type: ignore[misc]
        return False
    n_rows = 0
    for unit in units:
        try:
            rows = itertools.groupby(index for index, _ in documents(unit, config))
            n_rows += sum(1 for _ in itertools.islice(rows, ROWS_DRAWN))
        except DataError:
            return False  # said where the text is read in earnest
        if n_rows >= ROWS_DRAWN:
            return False
    return True


def numbered(units: Iterable[Unit]) -> list[Unit]:
    """Return the units with indices in their order."""
    return [replace(unit, index=index) for index, unit in enumerate(units)]


def _groups(files: list[Path]) -> Iterator[tuple[Path, ...]]:
    """Group consecutive files up to `GROUP_BYTES`; a larger file is a group of its own."""
    group: list[Path] = []
    size = 0
    for file in files:
        length = file.stat().st_size
        if group and size + length > GROUP_BYTES:
            yield tuple(group)
            group, size = [], 0
        group.append(file)
        size += length
    if group:
        yield tuple(group)


def documents(
    unit: Unit, config: DataConfig, cut: re.Pattern[str] = SAFE_CUT
) -> Iterator[tuple[int, str]]:
    """Yield (index of the document in the unit, next piece of its text), in a fixed order."""
    index = 0
    for entry in unit.paths:
        path = entry if isinstance(entry, Path) else entry.fetch()
        for pieces in _texts(path, config, cut):
            for piece in pieces:
                yield (0 if unit.joined else index), piece
            index += 1


def _texts(path: Path, config: DataConfig, cut: re.Pattern[str]) -> Iterator[Iterable[str]]:
    """Yield the documents of a file, each as its pieces."""
    if path == library.topics_file():
        for text in library.topics():
            yield (text,)
    elif readers.suffix_of(path) in readers.ROW_SUFFIXES:
        for text in readers.read_rows(path, config.text_field, config.encoding_errors):
            yield readers.in_pieces(text, cut)
    else:
        yield readers.read_text(path, config.encoding_errors, cut)


def content_hash(unit: Unit) -> str:
    """Return a sha256 over the unit's files: their content, or their pinned address."""
    digest = hashlib.sha256()
    for entry in unit.paths:
        if not isinstance(entry, Path):
            digest.update(f"{entry}\0".encode())
            continue
        with readers.readable(entry), entry.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def file_stats(unit: Unit) -> list[tuple[int, int, int]]:
    """Return what changes when a local file of the unit does: its inode, size and time, ns."""
    found = []
    for entry in unit.paths:
        if isinstance(entry, Path):
            with readers.readable(entry):
                stat = entry.stat()
            found.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return found


def size_of(files: Iterable[Path]) -> int:
    """Return the bytes of files on this machine."""
    return sum(file.stat().st_size for file in files)
