"""What an unfinished preparation has done: one small file for each finished unit.

`.progress/` is in the data folder from the first unit to the manifest. A unit's record is written
after its shards are on the disk, so a record means shards that are complete.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from gptcli import atomic
from gptcli.data import shards
from gptcli.data.shards import Manifest, Recipe, UnitRecord
from gptcli.errors import ConfigError, DataError
from gptcli.tokenizers import dtype_for

_FOLDER = ".progress"
_RECIPE = "recipe.json"
STORED = "-stored.2.json"  # of a unit whose tokens and keys are on the disk


class Journal:
    """The records of one data folder."""

    def __init__(self, folder: Path) -> None:
        self._data_folder = folder
        self._folder = folder / _FOLDER

    def recipe(self) -> Recipe | None:
        """Return the recipe of the unfinished preparation, None if there is none."""
        try:
            return Recipe.model_validate_json(atomic.read_bytes(self._folder / _RECIPE))
        except (OSError, ValidationError):
            return None

    def begin(self, recipe: Recipe) -> None:
        """Start the preparation of `recipe`, or resume it; refuse one of something else."""
        unfinished = self.recipe()
        if unfinished is None:
            atomic.make_folder(self._folder)
            content = recipe.model_dump_json(indent=1) + "\n"
            atomic.write_bytes(self._folder / _RECIPE, content.encode())
        elif differing := unfinished.differing(recipe):
            raise ConfigError(
                f"{self._data_folder} holds an unfinished preparation of other data;"
                f" it differs in: {', '.join(differing)}",
                "start over with --force, or choose another folder with --out",
            )

    def record(self, index: int) -> UnitRecord | None:
        """Return the record of a finished unit whose shards are there, else None."""
        record, recipe = self._read(self.file(index)), self.recipe()
        if record is None or recipe is None:
            return None
        try:
            dtype = dtype_for(recipe.tokenizer.vocab_size)
            for shard in record.shards:
                shards.check_shard(self._data_folder / shard.file, shard, dtype)
        except DataError:
            return None
        return record

    def commit(self, index: int, record: UnitRecord, suffix: str = ".json") -> None:
        """Note that a unit is finished or, with the suffix `STORED`, that it waits for others."""
        content = record.model_dump_json(indent=1) + "\n"
        atomic.write_bytes(self.file(index, suffix), content.encode())

    def stored(self, index: int) -> UnitRecord | None:
        """Return the record of a unit that waits for the others to be compared with, or None."""
        record = self._read(self.file(index, STORED))
        if record is None:
            return None
        for file in record.shards:
            path = self._folder / file.file
            is_whole = path.is_file() and path.stat().st_size == file.tokens
            if not is_whole and (path.suffix != ".tokens" or self.record(index) is None):
                return None
        return record

    def n_bytes(self) -> int:
        """Return the bytes of text of the finished units."""
        return sum(record.bytes.total for record in self._finished())

    def end(self) -> None:
        """Remove the records; the shards they name stay."""
        # The recipe goes last: without it the records mean nothing.
        for path in [*self._folder.glob("unit-*"), *self._folder.glob(_RECIPE),
                     *self._folder.glob(".tmp-*")]:  # fmt: skip
            path.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self._folder.rmdir()

    def discard(self) -> None:
        """Remove the records and the shards they name."""
        for record in self._finished():
            _remove(self._data_folder, _names([record]))
        self.end()

    def file(self, index: int, suffix: str = ".json") -> Path:
        """Return the path of a file about a unit; those of stored units have other suffixes."""
        return self._folder / f"unit-{index:06d}{suffix}"

    def _finished(self) -> Iterator[UnitRecord]:
        return filter(None, map(self._read, sorted(self._folder.glob("unit-*.json"), reverse=True)))

    def _read(self, path: Path) -> UnitRecord | None:
        try:
            return UnitRecord.model_validate_json(atomic.read_bytes(path))
        except (OSError, ValidationError):
            return None


def remove_prepared(folder: Path, manifest: Manifest) -> None:
    """Remove the files a manifest lists, itself first: what is left is an unfinished folder."""
    _remove(folder, [shards.MANIFEST, *_names(manifest.units), shards.TOKENIZER])


def _names(records: list[UnitRecord]) -> list[str]:
    shards_ = (shard for record in records for shard in record.shards)
    return [name for shard in shards_ for name in (shard.file, *shard.sizes)]


def _remove(folder: Path, names: list[str]) -> None:
    for path in (folder / name for name in names):
        with atomic.create_errors(path):
            path.unlink(missing_ok=True)
