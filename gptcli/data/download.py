"""Files of the network, one unit ahead of the work, and let go once their shards are committed."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from gptcli.config.schema import DataConfig
from gptcli.data.hub import OnBytes, RemoteFile
from gptcli.data.units import Unit


class Fetcher:
    """Fetches the files of units in their order; a context manager.

    With `data.keep_downloads: false` a file that this run downloaded is removed once it is
    released; one that was in the cache before is somebody's and stays.
    """

    def __init__(self, units: list[Unit], config: DataConfig, on_bytes: OnBytes) -> None:
        self._order = units
        self._keep = config.keep_downloads
        self._on_bytes = on_bytes
        self._pool = ThreadPoolExecutor(1)
        self._waiting: dict[int, Future[Unit]] = {}
        self._downloaded: dict[int, list[RemoteFile]] = {}

    def all(self) -> Iterator[Unit | None]:
        """Yield the units with local files, fetching each while the one before is worked on.

        A None comes before a unit that must be waited for.

        Raises:
            DataError: A file cannot be had.
        """
        self._begin(0)
        for place, unit in enumerate(self._order):
            waiting = self._waiting.pop(unit.index)
            if not waiting.done():
                yield None
            local = waiting.result()
            self._begin(place + 1)
            yield local

    def release(self, unit: Unit) -> None:
        """Say that a unit's shards are on the disk."""
        for file in self._downloaded.pop(unit.index, []):
            if not self._keep:
                file.forget()

    def _begin(self, place: int) -> None:
        if place < len(self._order):
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
            paths.append(entry.fetch(self._on_bytes))
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
