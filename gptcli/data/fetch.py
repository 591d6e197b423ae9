"""Files of the network, one unit ahead of the work, and let go once their shards are committed."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from gptcli.config.schema import DataConfig
from gptcli.data.hub import RemoteFile
from gptcli.data.units import Unit


class Fetcher:
    """Fetches the files of units in their order; a context manager.

    With `data.keep_downloads: false` a file that this run downloaded is removed once it is
    released; one that was in the cache before is somebody's and stays.
    """

    def __init__(self, units: list[Unit], config: DataConfig) -> None:
        self._units = {unit.index: place for place, unit in enumerate(units)}
        self._order = units
        self._keep = config.keep_downloads
        self._pool = ThreadPoolExecutor(1)
        self._waiting: dict[int, Future[Unit]] = {}
        self._downloaded: dict[int, list[RemoteFile]] = {}

    def fetched(self, unit: Unit) -> Unit:
        """Return the unit with local files, and begin to fetch the one after it.

        Raises:
            DataError: A file cannot be had.
        """
        place = self._units[unit.index]
        self._begin(place)
        found = self._waiting.pop(unit.index).result()
        self._begin(place + 1)
        return found

    def release(self, unit: Unit) -> None:
        """Say that a unit's shards are on the disk."""
        for file in self._downloaded.pop(unit.index, []):
            if not self._keep:
                file.forget()

    def _begin(self, place: int) -> None:
        if place < len(self._order) and self._order[place].index not in self._waiting:
            unit = self._order[place]
            self._waiting[unit.index] = self._pool.submit(self._fetch, unit)

    def _fetch(self, unit: Unit) -> Unit:
        paths: list[Path] = []
        for entry in unit.paths:
            if isinstance(entry, Path):
                paths.append(entry)
                continue
            if not entry.is_cached():
                self._downloaded.setdefault(unit.index, []).append(entry)
            paths.append(entry.fetch())
        return replace(unit, paths=tuple(paths))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=error is None, cancel_futures=True)
