"""Resolve the name of a source into units of work.

A name is a preset, a path or glob, `-` for stdin, or a Hub dataset.
"""

import atexit
import contextlib
import difflib
import glob
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from gptcli import atomic
from gptcli.config.schema import DataConfig, DataFormat, Split, SplitSource, TokenizerConfig
from gptcli.data import archives, hub, readers, remote
from gptcli.data.columns import saved_files, saved_splits
from gptcli.data.messages import FIELDS, format_of
from gptcli.data.presets import PRESETS, STDIN, Expected, Preset, is_address, is_named
from gptcli.data.units import (
    FILES_SPLIT_WHOLE,
    SplitRule,
    Unit,
    library_packages,
    numbered,
    size_of,
    units_of_files,
)
from gptcli.errors import ConfigError, DataError
from gptcli.seeding import derive_seed

_APPLICATIONS = {"idlelib", "lib2to3", "turtledemo"}  # whose names no one calls
LARGE_SOURCE = 50_000_000  # bytes from which a twentieth of a percent is validation enough


@dataclass(frozen=True)
class Source:
    """A source with its units, its size, and what the default validation part is."""

    name: str
    units: tuple[Unit, ...]
    n_bytes: int
    revision: str | None = None
    text_field: str | None = None  # that holds the text, where the preset knows it
    expected: Expected | None = None  # counts of a complete preparation, where they are known
    format: DataFormat | None = None  # of conversations; None: text

    @property
    def has_val(self) -> bool:
        """Whether some of the units are validation as a whole."""
        return any(unit.held_out == "val" for unit in self.units)

    def val_fraction(self, config: DataConfig) -> float:
        """Return the configured validation part, or the default for this size."""
        if config.val_fraction is not None:
            return config.val_fraction
        return 0.0005 if self.n_bytes >= LARGE_SOURCE else 0.1


@dataclass(frozen=True)
class PreparePlan:
    """What a preparation is going to do."""

    folder: Path
    source: Source
    data: DataConfig
    tokenizer: TokenizerConfig
    seed: int
    val_fraction: float


def find_source(config: DataConfig, seed: int) -> Source:
    """Return the source that `data.source` names."""
    if not config.source:
        raise ConfigError("no dataset named", "e.g. gpt prepare stdlib, or gpt prepare input.txt")
    if not isinstance(config.source, SplitSource):
        return _find(config.source, config, seed)
    if config.val_fraction is not None:
        raise ConfigError("data.val_fraction: the source names its own validation text")
    whole = config.model_copy(update={"val_fraction": 0.0})
    train, val = (_find(name, whole, seed) for name in (config.source.train, config.source.val))
    return _joined(f"{config.source.train} and {config.source.val}", train, val)


def _joined(name: str, train: Source, val: Source) -> Source:
    """Return a source with its own validation text."""
    units = [
        *(replace(unit, held_out="train") for unit in train.units),
        *(replace(unit, held_out="val") for unit in val.units),
    ]
    if train.format != val.format:
        forms = (source.format or "text" for source in (train, val))
        raise ConfigError("{}: train is {}, but val is {}".format(name, *forms))
    n_bytes = train.n_bytes + val.n_bytes
    return Source(name, tuple(numbered(units)), n_bytes, format=train.format)


def _find(source: str, config: DataConfig, seed: int) -> Source:
    """Return the source of one name, path or glob."""
    if source == STDIN:
        form = _format(config, list)
        path = _spooled_stdin(".jsonl" if form in FIELDS else ".txt")
        [unit] = units_of_files([path], config)
        return Source("stdin", (replace(unit, name="stdin"),), path.stat().st_size, format=form)
    if is_named(source):
        name, _, part = source.removeprefix("hf:").partition(":")
        if part and config.config and part != config.config:
            raise ConfigError(f"data.config is {config.config}, but the source says {part}")
        config = config.model_copy(update={"config": part or config.config})
        if source.startswith("hf:"):
            return _from_hub(name, hub.find_files(name, config.config, None), config)
        return _from_preset(source, PRESETS[name], config, seed)
    if config.config is not None:
        raise ConfigError("data.config names a part of a named dataset; local files have none")
    if is_address(source):
        return _remote(source, config)
    with archives.readable(Path(source)):
        return _local(source, config)


def _remote(source: str, config: DataConfig) -> Source:
    """Find the files behind an address; each is a unit."""
    remote.require_address(source, "data.source")
    found = remote.files_at(source)
    files = [f for f in found if archives.suffix_of(Path(f.path)) in readers.SUFFIXES]
    files = files or found[: len(found) == 1]  # one that is named is text, whatever its suffix
    if not files:
        raise DataError(
            f"{source}: no text at this address", f"looked for {' '.join(readers.SUFFIXES)}"
        )
    units = []
    for file in files:
        is_drawn = len(files) >= FILES_SPLIT_WHOLE or readers.holds_documents(Path(file.path))
        units.append(Unit(0, file.url, (file,), "documents" if is_drawn else "tail"))
    local = [file.fetch() for file in files[:1] if file.is_cached()]
    form = _format(config, lambda: _fields_of(local))
    n_bytes = sum(file.n_bytes for file in files)
    return Source(source, tuple(numbered(units)), n_bytes, format=form)


def _from_preset(source: str, preset: Preset, config: DataConfig, seed: int) -> Source:
    if config.format is None:
        config = config.model_copy(update={"format": preset.format})
    if preset.kind == "library":
        return _stdlib(config, seed, preset.name)
    if preset.kind == "file":
        if config.config is not None:
            raise ConfigError(f"{preset.name} has no parts, such as '{config.config}'")
        file = remote.StoredFile(preset.where, preset.download_bytes, None)
        return Source(preset.name, (Unit(0, preset.name, (file,), "tail"),), file.n_bytes)
    files = hub.find_files(preset.where, config.config or preset.config, preset.revision)
    is_whole, expected = config.config in (None, preset.config), preset.expected
    if expected.documents and expected.own_val_documents and config.val_fraction is not None:
        expected = Expected(expected.documents - expected.own_val_documents)
    return replace(
        _from_hub(source, files, config, joined=preset.kind == "lines"),
        text_field=preset.text_field,
        expected=expected if is_whole else None,
    )


def _spooled_stdin(suffix: str) -> Path:
    """Copy stdin, which can be read only once, into a file that is removed at exit."""
    if sys.stdin is None or sys.stdin.isatty():
        raise ConfigError("`-` reads text from stdin, but nothing is piped into it")
    with atomic.create_errors(Path(os.environ.get("TMPDIR") or "/tmp")):
        folder = Path(tempfile.gettempdir())  # not the one of TMPDIR if that is full
    with (
        atomic.create_errors(folder),
        tempfile.NamedTemporaryFile(prefix="gpt-stdin-", suffix=suffix, delete=False) as file,
    ):
        path = Path(file.name)
        atexit.register(path.unlink, missing_ok=True)
        shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
    return path


def _local(source: str, config: DataConfig) -> Source:
    """Find the files of a path or glob, and group them into units."""
    path = Path(source)
    if any(char in source for char in "*?[") and not path.exists():
        files = [Path(name) for name in sorted(glob.glob(source, recursive=True))]  # noqa: PTH207
        files = [file for file in files if file.is_file()]
        if not files:
            raise DataError(f"{source}: no file matches")
    elif path.is_dir():
        if splits := saved_splits(path):
            return _saved(source, splits, config)
        files = _files_of(path)
    elif path.is_file():
        files = [path]
    elif path.exists():
        raise DataError(f"{source}: neither a file nor a folder")
    elif path.is_symlink():
        raise DataError(f"{source}: a link that leads to no file or folder")
    elif re.fullmatch(r"[\w-]+", source):
        near = difflib.get_close_matches(source, PRESETS, 1)
        raise ConfigError(
            f"no preset, file or folder is named '{source}'",
            f"did you mean '{near[0]}'?" if near else f"presets: {', '.join(PRESETS)}",
        )
    else:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()  # says so when it is there and may not be seen
        raise DataError(
            f"{source}: no such file or folder",
            "put the text there, or name another: gpt prepare FILE, or -s data.source=FILE",
        )
    form = _format(config, lambda: _fields_of(files))
    if form == "docstrings":
        files = [file for file in files if archives.suffix_of(file) == ".py"]
        if not files:
            raise DataError(f"{source}: no Python source to make questions of")
    elif form is not None and (
        texts := [file for file in files if not readers.holds_documents(file)]
    ):
        raise DataError(
            f"{source}: has {'text only' if len(texts) == len(files) else 'conversations and text'}"
            f" ({archives.shown(texts[0])})",
            "name the conversations only, e.g. gpt prepare 'folder/*.jsonl'",
        )
    units = units_of_files(files, config.model_copy(update={"format": form}))
    return Source(archives.shown(source), tuple(units), size_of(files), format=form)


def _format(config: DataConfig, fields: Callable[[], Sequence[str]]) -> DataFormat | None:
    """Return the form of a source's conversations, None for text.

    It is the one that is set, or the one of the fields, unless they have the text's.
    """
    if config.format is not None:
        return None if config.format == "text" else config.format
    if "text_field" in config.model_fields_set or config.text_field in (found := fields()):
        return None
    return format_of(list(found))


def _saved(source: str, splits: Sequence[str], config: DataConfig) -> Source:
    """Return a dataset that `datasets.save_to_disk` wrote with several splits.

    Its validation split is used as such, unless `data.val_fraction` draws from the training rows.
    """
    if "train" not in splits:
        names = ", ".join(splits)
        raise DataError(
            f"{source}: no training split; the splits are: {names}",
            f"name the one to train on: gpt prepare {source}/{splits[0]}",
        )
    folders = [str(Path(source, split)) for split in ("train", "validation") if split in splits]
    if len(folders) == 1 or config.val_fraction is not None:
        return replace(_local(folders[0], config), name=archives.shown(source))
    whole = config.model_copy(update={"val_fraction": 0.0})
    return _joined(archives.shown(source), *(_local(folder, whole) for folder in folders))


def _fields_of(files: Sequence[Path]) -> list[str]:
    """Return the fields of the first file of rows; none where it cannot be read."""
    with contextlib.suppress(DataError):  # reported when it is tokenized
        return next(
            (readers.fields_of(file) for file in files if readers.holds_documents(file)), []
        )
    return []


def _files_of(folder: Path) -> list[Path]:
    """Return the files of a folder in their order; a DataError if it has none to read."""
    found = saved_files(folder) or _readable_files(folder)
    if files := sorted(found, key=lambda file: file.relative_to(folder).as_posix()):
        return files
    hint = f"looked for {' '.join(readers.SUFFIXES)}, also in {' '.join(archives.COMPRESSED)}"
    for suffix in sorted({file.suffix.lower() for file in folder.rglob("*")}):
        if (command := readers.CONVERTERS.get(suffix)) is not None:
            hint = f"convert its {suffix} files: {command.format('FILE')}"
    raise DataError(f"{folder}: no text in this folder", hint)


def _readable_files(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> NoReturn:
        raise error  # a folder that may not be read is not an empty one

    for parent, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in (Path(parent, name) for name in names if not name.startswith(".")):
            if archives.suffix_of(file) in readers.SUFFIXES and file.is_file():
                yield file


def _stdlib(config: DataConfig, seed: int, preset: str) -> Source:
    """The running Python's library without its tests, or one package of it (`stdlib:textwrap`).

    Packages are held out for validation in a keyed order while they fit into the fraction, so that
    no near-duplicate file of a package is in both splits. A single package is treated as any other
    few files: the tail of each is held out.
    """
    packages, form = library_packages(), _format(config, list)
    if form:
        packages = {name: files for name, files in packages.items() if name not in _APPLICATIONS}
    if config.config is not None:
        files = packages.get(config.config)
        if files is None:
            near = difflib.get_close_matches(config.config, packages, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"e.g. {preset}:textwrap"
            raise ConfigError(f"{preset} has no module '{config.config}'", hint)
        name = f"{preset}:{config.config}"
        unit = Unit(0, name, tuple(files), "end" if form else "tail")
        return Source(name, (unit,), size_of(files), format=form)
    sizes = {package: size_of(files) for package, files in packages.items()}
    total = sum(sizes.values())
    room = total * (config.val_fraction if config.val_fraction is not None else 0.1)
    held_out = set()
    for package in sorted(packages, key=lambda package: derive_seed("stdlib", seed, package)):
        if 0 < sizes[package] <= room:
            room -= sizes[package]
            held_out.add(package)
    by_split: dict[Split, list[Path]] = {"train": [], "val": []}
    for package, files in packages.items():
        by_split["val" if package in held_out else "train"] += files
    units = [
        Unit(0, f"{preset} {split}", tuple(files), split)
        for split, files in by_split.items()
        if files
    ]
    return Source(preset, tuple(numbered(units)), total, format=form)


def _from_hub(name: str, found: hub.HubFiles, config: DataConfig, joined: bool = False) -> Source:
    """Make each file on the Hub a unit; the dataset's own validation split is used as such.

    An explicit `data.val_fraction` draws the validation from the training rows instead.
    """
    own_split = bool(found.validation) and config.val_fraction is None
    files, units = found.train + found.validation * own_split, []
    for number, file in enumerate(files):
        is_val = number >= len(found.train)
        rule: SplitRule = "val" if is_val else "train" if own_split else "documents"
        units.append(Unit(number, f"{name}/{file.path}", (file,), rule, joined))
        if archives.suffix_of(Path(file.path)) not in readers.SUFFIXES:
            raise DataError(
                f"hf:{file.repository}: {file.path} is an unsupported file type",
                f"files that are: {' '.join(readers.SUFFIXES)}",
            )
    local = [file.fetch() for file in files[:1] if not found.fields and file.is_cached()]
    form = _format(config, lambda: found.fields or _fields_of(local))
    n_bytes = sum(file.n_bytes for file in files)
    return Source(name, tuple(units), n_bytes, found.revision, format=form)
