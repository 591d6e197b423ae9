"""What an unfinished preparation has done: one small file for each finished unit.

`.progress/` stands in the data folder from the first unit to the manifest. A unit's record is
written after its shards are on the disk, so a record means shards that are whole.
"""

import contextlib
from pathlib import Path

from pydantic import ValidationError

from gptcli import atomic
from gptcli.data import shards
from gptcli.data.shards import Manifest, Recipe, UnitRecord
from gptcli.errors import ConfigError, DataError, StorageError

_FOLDER = ".progress"
_RECIPE = "recipe.json"


class Journal:
    """The records of one data folder."""

    def __init__(self, folder: Path) -> None:
        self._data_folder = folder
        self._folder = folder / _FOLDER

    def recipe(self) -> Recipe | None:
        """Return what the unfinished preparation is of, or None if there is none."""
        try:
            return Recipe.model_validate_json(atomic.read_bytes(self._folder / _RECIPE))
        except (OSError, ValidationError):
            return None

    def begin(self, recipe: Recipe) -> None:
        """Take up the preparation of `recipe`, or go on with it.

        Raises:
            ConfigError: The folder holds an unfinished preparation of something else.
        """
        found = self.recipe()
        if found is not None and found != recipe:
            old, new = found.model_dump(), recipe.model_dump()
            differing = ", ".join(key for key in new if old[key] != new[key])
            raise ConfigError(
                f"{self._data_folder} holds an unfinished preparation of other data;"
                f" it differs in: {differing}",
                "start over with --force, or choose another folder with --out",
            )
        if found is None:
            atomic.make_folder(self._folder)
            content = recipe.model_dump_json(indent=1) + "\n"
            atomic.write_bytes(self._folder / _RECIPE, content.encode())

    def record(self, index: int) -> UnitRecord | None:
        """Return the record of a finished unit whose shards are there, else None."""
        try:
            content = atomic.read_bytes(self._file(index))
            record = UnitRecord.model_validate_json(content)
            recipe = self.recipe()
            if recipe is None:
                return None
            dtype = shards.dtype_for(recipe.tokenizer.vocab_size)
            for shard in record.shards:
                shards.check_shard(self._data_folder / shard.file, shard, dtype)
        except (OSError, ValidationError, DataError):
            return None
        return record

    def commit(self, index: int, record: UnitRecord) -> None:
        """Note that a unit is finished."""
        content = record.model_dump_json(indent=1) + "\n"
        atomic.write_bytes(self._file(index), content.encode())

    def n_bytes(self) -> int:
        """Return the bytes of text of the finished units."""
        total = 0
        for path in self._folder.glob("unit-*.json"):
            with contextlib.suppress(OSError, ValidationError):
                counts = UnitRecord.model_validate_json(atomic.read_bytes(path)).bytes
                total += counts.train + counts.val
        return total

    def end(self) -> None:
        """Remove the records; the shards they name stay."""
        for path in self._files():
            path.unlink(missing_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self._folder.rmdir()

    def discard(self) -> None:
        """Remove the records and the shards they name."""
        for path in self._files():
            if path.name == _RECIPE:
                continue
            try:
                listed = UnitRecord.model_validate_json(atomic.read_bytes(path)).shards
            except (OSError, ValidationError):
                continue
            for shard in listed:
                remove_listed(self._data_folder, shard.file)
        self.end()

    def _file(self, index: int) -> Path:
        return self._folder / f"unit-{index:06d}.json"

    def _files(self) -> list[Path]:
        # The recipe goes last: without it the records mean nothing.
        found = sorted(self._folder.glob("unit-*.json"), reverse=True)
        return [*found, *self._folder.glob(_RECIPE), *self._folder.glob(".tmp-*")]


def remove_prepared(folder: Path, manifest: Manifest) -> None:
    """Remove the files a manifest lists, itself first: what is left is an unfinished folder."""
    listed = [shard.file for unit in manifest.units for shard in unit.shards]
    for name in [shards.MANIFEST, *listed, shards.TOKENIZER]:
        remove_listed(folder, name)


def remove_listed(folder: Path, name: str) -> None:
    """Remove a file that one of our lists names.

    Raises:
        StorageError: It may not be removed.
    """
    try:
        (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"{folder / name}: {error.strerror}") from error
