"""The text of documents that are XML in a zip: Word's .docx, and e-books (.epub) in reading order.

Paragraphs end in an empty line; pictures, notes and formatting are left out. Parsed as a stream: no
entity that a file declares is expanded, and nothing outside the file is read.
"""

import posixpath
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from html.entities import html5
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.parsers import expat

from gptcli.data.archives import File, Reading
from gptcli.errors import DataError

SUFFIXES = (".docx", ".epub")
_MAX_PART_BYTES = 1 << 27  # of a chapter, uncompressed
_MAX_DEPTH = 1000  # of elements in elements
_READ_BYTES = 1 << 16

_PARAGRAPHS = {"p", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "pre", "table", "ul", "ol"}
_LINES = {"br", "div", "li", "tr", "dt", "dd"}
_LEFT_OUT = {"head", "script", "style", "svg", "math", "Fallback"}

_SPACE = (" ", "\t", "\r", "\n")
_SPACES = re.compile(r"[ \t\r\n]+")
_PARTS = 10_000  # of text, gathered before they are passed on

Attributes = dict[str, str]


def text_of(path: File, errors: str) -> Iterator[str]:
    """Yield the text of a document, a part of it at a time.

    Raises:
        DataError: It is damaged, encrypted or not what its name says.
    """
    assert isinstance(path, Path)
    try:
        with zipfile.ZipFile(path) as archive:
            book = _Book(path, archive)
            if path.suffix.lower() == ".docx":
                yield from book.text(["word/document.xml"], is_word=True)
            else:
                yield from book.text(book.chapters(), is_word=False)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError) as error:
        raise DataError(f"{path}: damaged {path.suffix} file ({error})") from error


class _Book:
    """A zip of XML files."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self._path, self._archive = path, archive
        self._names = set(archive.namelist())
        self._reading = Reading(path, path.stat().st_size)

    def chapters(self) -> list[str]:
        """Return the names of an e-book's chapters in reading order."""
        packages: list[str] = []
        files: dict[str, str] = {}
        spine: dict[str, None] = {}

        def start(tag: str, attributes: Attributes) -> None:
            if tag == "rootfile":
                packages.append(attributes.get("full-path", ""))
            elif tag == "item":
                files[attributes.get("id", "")] = unquote(attributes.get("href", ""))
            elif tag == "itemref":
                spine[attributes.get("idref", "")] = None

        self._parse("META-INF/container.xml", start)
        for package in packages[:1]:
            self._parse(package, start)
        folder = posixpath.dirname("".join(packages[:1]))
        found = [files[name] for name in spine if name in files]
        return list(dict.fromkeys(posixpath.normpath(posixpath.join(folder, f)) for f in found))

    def text(self, names: list[str], is_word: bool) -> Iterator[str]:
        """Yield the text of parts, some paragraphs at a time."""
        text = _Text(is_word)
        for name in names:
            for _ in self._parsed(name, text.start, text.end, text.add):
                yield text.take(_PARTS)
            text.end("p")
        yield text.take()

    def _parse(self, name: str, start: Callable[[str, Attributes], None]) -> None:
        for _ in self._parsed(name, start, lambda tag: None, lambda text: None):
            pass

    def _parsed(
        self,
        name: str,
        start: Callable[[str, Attributes], None],
        end: Callable[[str], None],
        add: Callable[[str], None],
    ) -> Iterator[None]:
        """Parse a part, yielding after each piece of it that was read."""
        where, depth = f"{self._path}: {name}", 0
        parser = expat.ParserCreate(namespace_separator=" ")
        parser.buffer_text = True
        parser.UseForeignDTD(True)  # names such as &nbsp; are then skipped, not errors

        def started(tag: str, attributes: Attributes) -> None:
            nonlocal depth
            depth += 1
            if depth > _MAX_DEPTH:
                raise DataError(f"{where}: more than {_MAX_DEPTH} elements in each other")
            start(_local(tag), attributes)

        def ended(tag: str) -> None:
            nonlocal depth
            depth -= 1
            end(_local(tag))

        def declared(*entity: Any) -> None:
            raise DataError(
                f"{where}: declares the entity {str(entity[0])[:40]!r}, which is refused"
            )

        parser.StartElementHandler, parser.EndElementHandler = started, ended
        parser.CharacterDataHandler, parser.EntityDeclHandler = add, declared
        parser.SkippedEntityHandler = lambda entity, _: add(html5.get(f"{entity};", ""))
        try:
            for data in self._read(name):
                parser.Parse(data, False)
                yield
            parser.Parse(b"", True)
        except (expat.ExpatError, ValueError, LookupError) as error:
            hint = "convert it, e.g. with pandoc or ebook-convert, and prepare the text"
            raise DataError(f"{where}: not well-formed XML ({error})", hint) from error

    def _read(self, name: str) -> Iterator[bytes]:
        if name not in self._names:
            raise DataError(f"{self._path}: not a {self._path.suffix} file (no {name[:80]} in it)")
        n_bytes = 0
        try:
            with self._archive.open(name) as file:
                while data := file.read(_READ_BYTES):
                    n_bytes += len(data)
                    self._reading.add(len(data))
                    if n_bytes > _MAX_PART_BYTES:
                        raise DataError(f"{self._path}: {name} is larger than any chapter")
                    yield data
        except RuntimeError as error:  # zipfile's, for a password
            raise DataError(f"{self._path}: {name} is encrypted") from error


def _local(tag: str) -> str:
    return tag.rpartition(" ")[2]


class _Text:
    """Gathers the text between tags; white space is as a reader of the page sees it."""

    def __init__(self, is_word: bool) -> None:
        self._is_word, self._left_out, self._verbatim = is_word, 0, 0
        self._parts: list[str] = []
        self._breaks, self._has_space, self._is_first = 0, False, True

    def start(self, tag: str, attributes: Attributes) -> None:
        self._left_out += tag in _LEFT_OUT
        if self._is_word:
            self._verbatim += tag == "t"
            if tag == "br" or (tag == "tab" and not attributes):  # one with a place is a setting
                self._append("\n" if tag == "br" else "\t")
            return
        self._verbatim += tag == "pre"
        self._break(tag)

    def end(self, tag: str) -> None:
        self._left_out -= tag in _LEFT_OUT
        self._verbatim -= tag == ("t" if self._is_word else "pre")
        if tag == "p" or not self._is_word:
            self._break(tag)

    def _break(self, tag: str) -> None:
        if tag in _PARAGRAPHS:
            self._breaks = 2
        elif tag in _LINES:
            self._breaks = max(1, self._breaks)

    def add(self, text: str) -> None:
        if self._left_out:
            return
        if self._verbatim:
            self._append(text)
        elif not self._is_word:
            words = " ".join(_SPACES.split(text)).strip(" ")
            self._has_space |= text[:1] in _SPACE
            if words:
                self._append(words)
                self._has_space = text[-1:] in _SPACE

    def _append(self, text: str) -> None:
        if not self._is_first:
            self._parts.append("\n" * self._breaks or " " * self._has_space)
        self._parts.append(text)
        self._breaks, self._has_space, self._is_first = 0, False, False

    def take(self, least: int = 0) -> str:
        """Return what is there, if it has at least so many parts."""
        if len(self._parts) < least:
            return ""
        taken = "".join(self._parts)
        self._parts.clear()
        return taken
