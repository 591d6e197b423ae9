"""From the name of a source to its units of work and their documents, in a fixed order.

A unit (one rows file, or a group of text files) is prepared on its own and becomes its own shards,
so the output does not depend on who prepares what. Knows nothing of tokens.
"""

import contextlib
import difflib
import glob
import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from gptcli.config.schema import DataConfig
from gptcli.data import hub, library, readers
from gptcli.data.presets import PRESETS, unknown_preset
from gptcli.errors import ConfigError, DataError
from gptcli.keyed import keyed_float, keyed_int
from gptcli.tokenizers import SAFE_CUT

Split = Literal["train", "val"]

GROUP_BYTES = 32 << 20  # text files are grouped up to this size
FILES_SPLIT_WHOLE = 100  # from here on whole files are held out, below the tail of each
LARGE_SOURCE = 50_000_000  # bytes from which a twentieth of a percent is validation enough


@dataclass(frozen=True)
class Unit:
    """One piece of work: files whose documents become shards of their own.

    Attributes:
        index: Its place in the source, and the first number in its shards' names.
        name: What messages call it.
        paths: Local files, or files on the Hub that are fetched when read.
        held_out: How validation is chosen: "documents" by a keyed draw, the "tail" of each
            document's tokens, or the whole unit is one split.
    """

    index: int
    name: str
    paths: tuple[Path | hub.HubFile, ...]
    held_out: Literal["documents", "tail", "train", "val"]

    def split_of(self, document: int, seed: int, val_fraction: float) -> Split:
        """Return the split of a document of this unit (of its head, for "tail")."""
        match self.held_out:
            case "val":
                return "val"
            case "documents":
                drawn = keyed_float("split", seed, self.index, document)
                return "val" if drawn < val_fraction else "train"
        return "train"


@dataclass(frozen=True)
class Source:
    """A source with its units, its size, and what the default validation part is."""

    name: str
    units: tuple[Unit, ...]
    n_bytes: int
    revision: str | None = None
    text_field: str | None = None
    """The field that holds the text, where the preset knows it."""

    def val_fraction(self, config: DataConfig) -> float:
        """Return the configured validation part, or the default for this size."""
        if config.val_fraction is not None:
            return config.val_fraction
        return 0.0005 if self.n_bytes >= LARGE_SOURCE else 0.1


def source_name(source: str) -> str:
    """Return the name a source's data folder gets: data/<name>."""
    if source in PRESETS:
        return source
    if _is_named(source):
        return _folder_name(source.removeprefix("hf:").rpartition("/")[2])
    path = Path(re.split(r"[*?\[]", source)[0])  # a glob's fixed part
    name = path.name if path.is_dir() else Path(path.name.removesuffix(".gz")).stem
    return _folder_name(path.resolve().name if name in ("", "..") else name)


def _folder_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "text"


def data_dir(config: DataConfig) -> Path:
    """Return the folder of the shards.

    Raises:
        ConfigError: Neither `data.dir` nor `data.source` is set.
    """
    if config.dir is not None:
        return Path(config.dir)
    if config.source is None:
        raise ConfigError(
            "neither data.source nor data.dir is set: there is no data to work on",
            "e.g. gpt prepare stdlib, then -s data.dir=data/stdlib",
        )
    return Path("data") / source_name(config.source)


def _is_named(source: str) -> bool:
    """Tell whether `source` is a preset or a Hub data set, perhaps with `:part` behind it."""
    return source.startswith("hf:") or source.partition(":")[0] in PRESETS


def is_local(config: DataConfig) -> bool:
    """Tell whether `data.source` names text that is on this machine."""
    if config.source is None or config.source.startswith("hf:"):
        return False
    preset = PRESETS.get(config.source.partition(":")[0])
    return preset is None or preset.repository is None


def find_source(config: DataConfig, seed: int) -> Source:
    """Return the source that `data.source` names.

    Raises:
        ConfigError: Nothing is named, or the name is unknown.
        DataError: The files are missing or of a kind that is not read.
    """
    if config.source is None:
        raise ConfigError("no data set named", "e.g. gpt prepare stdlib, or gpt prepare input.txt")
    source = config.source
    if _is_named(source):
        name, _, part = source.removeprefix("hf:").partition(":")
        if part and config.config and part != config.config:
            raise ConfigError(f"data.config is {config.config}, but the source says {part}")
        config = config.model_copy(update={"config": part or config.config})
        preset = None if source.startswith("hf:") else PRESETS[name]
        if preset is None:
            return _from_hub(name, hub.find_files(name, config.config, None), config, None)
        if preset.repository is None:
            return _stdlib(config, seed)
        found = hub.find_files(preset.repository, config.config or preset.config, preset.revision)
        return _from_hub(source, found, config, preset.text_field)
    if config.config is not None:
        raise ConfigError("data.config names a part of a named data set; local files have none")
    with readers.readable(Path(source)):
        return _local(source)


def documents(
    unit: Unit, config: DataConfig, cut: re.Pattern[str] = SAFE_CUT
) -> Iterator[tuple[int, str]]:
    """Yield (index of the document in the unit, next piece of its text), in a fixed order."""
    index = 0
    for entry in unit.paths:
        path = entry.fetch() if isinstance(entry, hub.HubFile) else entry
        for pieces in _texts(path, config, cut):
            for piece in pieces:
                yield index, piece
            index += 1


def _texts(path: Path, config: DataConfig, cut: re.Pattern[str]) -> Iterator[Iterable[str]]:
    """Yield the documents of a file, each as its pieces."""
    if path == library.topics_file():
        for text in library.topics():
            yield (text,)
    elif readers.suffix_of(path) in readers.ROW_SUFFIXES:
        for text in readers.read_rows(path, config.text_field, config.encoding_errors):
            yield (text,)
    else:
        yield readers.read_text(path, config.encoding_errors, cut)


def fingerprint(unit: Unit) -> str:
    """Return a sha256 over the unit's files: their content, or their pinned address."""
    digest = hashlib.sha256()
    for entry in unit.paths:
        if isinstance(entry, hub.HubFile):
            digest.update(f"{entry}\0".encode())
            continue
        with readers.readable(entry), entry.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _local(source: str) -> Source:
    """Find the files of a path or glob, and group them into units."""
    path = Path(source)
    is_pattern = any(char in source for char in "*?[") and not path.exists()
    if is_pattern:
        files = [Path(name) for name in sorted(glob.glob(source, recursive=True))]  # noqa: PTH207
        files = [file for file in files if file.is_file()]
        if not files:
            raise DataError(f"{source}: no file matches")
    elif path.is_dir():
        files = sorted(_readable_files(path), key=lambda file: file.relative_to(path).as_posix())
        if not files:
            known = " ".join((*readers.TEXT_SUFFIXES, *readers.ROW_SUFFIXES))
            raise DataError(f"{source}: no text in this folder", f"looked for {known} and .gz")
    elif path.is_file():
        files = [path]
    elif path.exists():
        raise DataError(f"{source}: neither a file nor a folder")
    elif re.fullmatch(r"[\w-]+", source):
        raise unknown_preset(source)
    else:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()  # says so when it is there and may not be seen
        raise DataError(f"{source}: no such file or folder")
    return Source(source, tuple(_units(files)), _size(files))


def _readable_files(folder: Path) -> Iterator[Path]:
    known = (*readers.TEXT_SUFFIXES, *readers.ROW_SUFFIXES)

    def fail(error: OSError) -> NoReturn:
        raise error  # a folder that may not be read is not an empty one

    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in (Path(parent, name) for name in names if not name.startswith(".")):
            if readers.suffix_of(file) in known and file.is_file():
                yield file


def _units(files: list[Path]) -> Iterator[Unit]:
    """Make each rows file a unit, and group the text files, in the order of the files."""
    is_rows = [readers.suffix_of(file) in readers.ROW_SUFFIXES for file in files]
    n_texts = len(files) - sum(is_rows)
    held_out: Literal["documents", "tail"] = "documents" if n_texts >= FILES_SPLIT_WHOLE else "tail"
    texts = [file for file, rows in zip(files, is_rows, strict=True) if not rows]
    index = 0
    for group in _groups(texts):
        yield Unit(index, str(group[0]), group, held_out)
        index += 1
    for file in (file for file, rows in zip(files, is_rows, strict=True) if rows):
        yield Unit(index, str(file), (file,), "documents")
        index += 1


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


def _stdlib(config: DataConfig, seed: int) -> Source:
    """The running Python's library without its tests, or one package of it (`stdlib:textwrap`).

    Packages are taken for validation in a keyed order as long as they fit into the fraction, so
    that no near-duplicate file of a package stands on both sides. A single package is treated as
    any other few files: the tail of each is held out.
    """
    packages = library.packages()
    if config.config is not None:
        files = packages.get(config.config)
        if files is None:
            near = difflib.get_close_matches(config.config, packages, 1)
            hint = f"did you mean '{near[0]}'?" if near else "e.g. stdlib:textwrap"
            raise ConfigError(f"stdlib has no module '{config.config}'", hint)
        name = f"stdlib:{config.config}"
        return Source(name, (Unit(0, name, tuple(files), "tail"),), _size(files))
    sizes = {package: _size(files) for package, files in packages.items()}
    total = sum(sizes.values())
    room = total * (config.val_fraction if config.val_fraction is not None else 0.1)
    held_out = set()
    for package in sorted(packages, key=lambda package: keyed_int("stdlib", seed, package)):
        if 0 < sizes[package] <= room:
            room -= sizes[package]
            held_out.add(package)
    splits: list[tuple[Split, list[Path]]] = [
        ("train", [f for name, files in packages.items() if name not in held_out for f in files]),
        ("val", [f for name, files in packages.items() if name in held_out for f in files]),
    ]
    chosen = [(split, files) for split, files in splits if files]
    units = (
        Unit(i, f"stdlib {split}", tuple(files), split) for i, (split, files) in enumerate(chosen)
    )
    return Source("stdlib", tuple(units), total)


def _size(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _from_hub(name: str, found: hub.HubFiles, config: DataConfig, text_field: str | None) -> Source:
    """Make each file on the Hub a unit; a validation split of the data set's own is used as such.

    An explicit `data.val_fraction` draws the validation from the training rows instead.
    """
    own_split = bool(found.validation) and config.val_fraction is None
    files: list[tuple[hub.HubFile, Literal["documents", "train", "val"]]]
    files = [(file, "train" if own_split else "documents") for file in found.train]
    if own_split:
        files += [(file, "val") for file in found.validation]
    known = (*readers.TEXT_SUFFIXES, *readers.ROW_SUFFIXES)
    for file, _ in files:
        if readers.suffix_of(Path(file.path)) not in known:
            raise DataError(
                f"hf:{file.repository}: {file.path} is of a kind that is not read",
                f"files that are: {' '.join(known)}",
            )
    units = tuple(
        Unit(index, f"{name}/{file.path}", (file,), held_out)
        for index, (file, held_out) in enumerate(files)
    )
    return Source(name, units, sum(file.n_bytes for file, _ in files), found.revision, text_field)
