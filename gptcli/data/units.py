"""Units of work: groups of files, their documents in a fixed order, and how they are split.

A unit (one rows file, or a group of text files) is prepared alone and becomes its own shards, so
the output does not depend on who prepares what. Knows nothing of tokens.
"""

import hashlib
import itertools
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from gptcli.config.model import clipped
from gptcli.config.schema import DataConfig, Split
from gptcli.data import archives, readers
from gptcli.data.docstrings import conversations_of, module_name
from gptcli.data.filters import Rules
from gptcli.data.hub import OnBytes
from gptcli.data.messages import FIELDS, OPTIONAL, BadRow, Turns, conversation_of
from gptcli.data.remote import RemoteFile
from gptcli.errors import DataError
from gptcli.seeding import derive_uniform

# How validation is chosen: "documents" by a keyed draw, the "tail" of each document's tokens, the
# "end" of the unit's tokens, or the whole unit is one split.
SplitRule = Literal["documents", "tail", "end", "train", "val"]

GROUP_BYTES = 32 << 20  # text files are grouped up to this size
FILES_SPLIT_WHOLE = 100  # from this many files on, whole files are held out, not the tail of each
ROWS_DRAWN = 100  # from this many rows on, validation rows are drawn, not taken from the end
_MAX_COUNTED_BYTES = 64 << 20  # of rows files that are read to count their rows
_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@dataclass(frozen=True)
class Unit:
    """One piece of work: files whose documents become their own shards."""

    index: int  # its place in the source, and the first number in its shards' names
    name: str  # what messages call it
    paths: tuple[Path | RemoteFile, ...]  # remote files are downloaded before they are read
    held_out: SplitRule
    joined: bool = False  # the rows are lines of one document (as WikiText's are), not documents

    def split_of(self, document: int, seed: int, val_fraction: float) -> Split:
        """Return the split of a document of this unit (of its head, for "tail" and "end")."""
        if self.held_out == "documents":
            drawn = derive_uniform("split", seed, self.index, document)
            return "val" if drawn < val_fraction else "train"
        return "val" if self.held_out == "val" else "train"


def units_of_files(files: list[Path], config: DataConfig) -> list[Unit]:
    """Group text files, then make each rows file a unit, in the order of the files."""
    is_rows = {file: readers.holds_documents(file) for file in files}
    texts = [file for file in files if not is_rows[file]]
    if config.format:
        units = [Unit(0, archives.shown(group[0]), group, "documents") for group in _groups(files)]
        if _are_few(units, config):  # conversations: held out are the last of all
            units = [replace(units[0], paths=tuple(files), held_out="end")]
        return numbered(units)
    held_out: SplitRule = "documents" if len(texts) >= FILES_SPLIT_WHOLE else "tail"
    units = [Unit(0, archives.shown(group[0]), group, held_out) for group in _groups(texts)]
    rows = [Unit(0, archives.shown(file), (file,), "documents") for file in files if is_rows[file]]
    if _are_few(rows, config):
        rows = [replace(unit, held_out="end") for unit in rows]
    return numbered(units + rows)


def _are_few(units: list[Unit], config: DataConfig) -> bool:
    """Tell whether files hold too few rows for a draw of them to come near its share."""
    paths = (path for unit in units for path in unit.paths if isinstance(path, Path))
    if size_of(paths) > _MAX_COUNTED_BYTES:
        return False
    config = config.model_copy(update={"filters": None})
    n_rows = 0
    for unit in units:
        try:
            rows = itertools.groupby(index for index, *_ in documents(unit, config))
            n_rows += sum(1 for _ in itertools.islice(rows, ROWS_DRAWN))
        except DataError:
            return False  # reported when the text is tokenized
        if n_rows >= ROWS_DRAWN:
            return False
    return True


def numbered(units: Iterable[Unit]) -> list[Unit]:
    """Return the units with indices in their order."""
    return [replace(unit, index=index) for index, unit in enumerate(units)]


def _groups(files: list[Path]) -> Iterator[tuple[Path, ...]]:
    """Group consecutive files up to `GROUP_BYTES`; a larger file is a group by itself."""
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


def library_packages() -> dict[str, list[Path]]:
    """Return the sources of this Python's library without its tests, by top-level package."""
    root = Path(sysconfig.get_path("stdlib"))
    packages: dict[str, list[Path]] = {}
    for file in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix()):
        parts = file.relative_to(root).parts
        if not _NOT_LIBRARY.intersection(parts):
            packages.setdefault(parts[0].removesuffix(".py"), []).append(file)
    if not packages:
        raise DataError(f"{root}: this Python comes without its library's sources")
    return packages


def documents(
    unit: Unit,
    config: DataConfig,
    cut: re.Pattern[str] | None = None,
    skipped: list[tuple[str, str]] | None = None,
) -> Iterator[tuple[int, str, int]]:
    """Yield (index of the document, next piece of its text, role) of a unit, in a fixed order.

    A conversation is a document whose pieces are what is said, each with the index of its role in
    `ROLES`; of text it is -1. The reason and place of what is left out are added to `skipped`; a
    document that a filter leaves out is counted by the index, and a conversation is not.

    Raises:
        DataError: A row is not a conversation, and `data.bad_rows` is "refuse".
    """
    from gptcli.tokenizers import SAFE_CUT  # which imports numpy; to name a source needs none
    from gptcli.tokenizers.chat import ROLES

    rules = Rules(config.filters) if config.filters else None
    left_out, index = [] if skipped is None else skipped, 0
    for path in (each if isinstance(each, Path) else each.fetch() for each in unit.paths):
        name = unit.name if len(unit.paths) == 1 else archives.shown(path)
        for place, found in _conversations(path, config) if config.format else ():
            where = f"{name}: {place}"
            if isinstance(found, BadRow):
                if config.bad_rows == "refuse":
                    raise DataError(
                        f"{where}: {found.reason} ({found.detail})",
                        "fix the row, or skip and count such rows with -s data.bad_rows=skip",
                    )
                left_out.append((found.reason, where))
                continue
            texts = [readers.sound(text, where, config.encoding_errors) for _, text in found]
            whole = "\n".join(texts)
            if rules and (reason := rules(iter([whole]), where)) is not None:
                left_out.append((reason, f"{where}: {excerpt(whole)}"))
                continue
            for (role, _), text in zip(found, texts, strict=True):
                yield index, text, ROLES.index(role)
            index += 1
        for number, pieces in enumerate(
            () if config.format else _texts(path, config, cut or SAFE_CUT), 1
        ):
            place = f"{name}: document {number}"
            if rules and (reason := rules(pieces(), place)) is not None:
                left_out.append((reason, f"{place}: {excerpt(next(pieces()))}"))
            else:
                for piece in pieces():
                    yield (0 if unit.joined else index), piece, -1
            index += 1


def _conversations(path: Path, config: DataConfig) -> Iterator[tuple[str, Turns | BadRow]]:
    form, errors = config.format, config.encoding_errors
    assert form is not None and form != "text"
    if form == "docstrings":
        if (module := module_name(path)) is not None:
            source = "".join(readers.read_text(path, errors, re.compile(r"\n")))
            for line, found in conversations_of(source, module):
                yield f"line {line}", found
        return
    for file in readers.files_in(path):
        inside = "" if file is path else f"{file.name}: "
        for place, row in readers.read_records(file, FIELDS[form], OPTIONAL, errors):
            yield inside + place, conversation_of(row, form)


def excerpt(text: str) -> str:
    """Return the start of a text on one line, in quotation marks."""
    return repr(clipped(" ".join(text[:400].split())))


def _texts(
    path: Path, config: DataConfig, cut: re.Pattern[str]
) -> Iterator[Callable[[], Iterator[str]]]:
    """Yield the documents of a file, each as a function that reads its pieces."""
    if path == Path(sysconfig.get_path("stdlib"), "pydoc_data", "topics.py"):
        from pydoc_data.topics import topics  # the prose of the language reference, by topic

        for name in sorted(topics):
            yield partial(iter, [topics[name]])
        return
    for file in readers.files_in(path):
        if archives.suffix_of(file) in readers.ROW_SUFFIXES:
            for text in readers.read_rows(file, config.text_field, config.encoding_errors):
                yield partial(readers.in_pieces, text, cut)
            continue
        read = partial(readers.read_text, file, config.encoding_errors, cut)
        # Filters read a document twice, and an archive is a stream: what is in it is then held.
        once = config.filters is not None and not isinstance(file, Path)
        yield partial(iter, list(read())) if once else read


class Fetcher(AbstractContextManager["Fetcher"]):
    """Downloads the files of units in their order, one unit ahead of the work.

    With `data.keep_downloads: false` a file that this run downloaded is removed once it is
    released; one that was in the cache before stays.
    """

    def __init__(self, units: Sequence[Unit], config: DataConfig, on_bytes: OnBytes) -> None:
        self._units, self._on_bytes, self._pool = units, on_bytes, ThreadPoolExecutor(1)
        files = (file for unit in units for file in unit.paths if not isinstance(file, Path))
        self._removed = set() if config.keep_downloads else {f for f in files if not f.is_cached()}

    def __iter__(self) -> Iterator[Unit | None]:
        """Yield the units with local files; a None comes before a unit that must be waited for."""
        ahead: Future[Unit] | None = None
        for unit, following in itertools.zip_longest(self._units, self._units[1:]):
            future = ahead or self._pool.submit(self._fetch, unit)
            if not future.done():
                yield None
            local = future.result()
            ahead = self._pool.submit(self._fetch, following) if following else None
            yield local

    def _fetch(self, unit: Unit) -> Unit:
        fetched = (p if isinstance(p, Path) else p.fetch(self._on_bytes) for p in unit.paths)
        return replace(unit, paths=tuple(fetched))

    def release(self, unit: Unit) -> None:
        """Note that a unit's shards are on the disk."""
        for file in self._removed.intersection(unit.paths):
            file.forget()

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(wait=error[0] is None, cancel_futures=True)


def content_hash(unit: Unit) -> str:
    """Return a sha256 over the unit's files: their content, or their pinned address."""
    digest = hashlib.sha256()
    for entry in unit.paths:
        if not isinstance(entry, Path):
            digest.update(f"{entry}\0".encode())
            continue
        with archives.readable(entry), entry.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def file_stats(unit: Unit) -> list[tuple[int, int, int]]:
    """Return what changes when a local file of the unit does: its inode, size and time, ns."""
    stats = []
    for entry in unit.paths:
        if isinstance(entry, Path):
            with archives.readable(entry):
                stat = entry.stat()
            stats.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
    return stats


def size_of(files: Iterable[Path]) -> int:
    """Return the bytes of files on this machine."""
    return sum(file.stat().st_size for file in files)
