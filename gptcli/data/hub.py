"""Files of the Hugging Face Hub: data sets by names resolved by `datasets`, fetched one by one.

Each file is pinned to a commit, so a second run reads the same bytes. Which files a data set has
is remembered in the Hub's cache beside them, so that what was found once is found offline.
"""

import contextlib
import dataclasses
import json
import logging
import os
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import quote, urlsplit

from gptcli import atomic
from gptcli.data.presets import unknown_part
from gptcli.errors import DataError, GptError

# ConnectionError is Python's and requests', TransportError httpx's.
_UNREACHABLE = {
    "OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectionError", "TransportError",
    "URLError",
}  # fmt: skip

_CUT = {"ReadError", "RemoteProtocolError", "TimeoutException", "ChunkedEncodingError",
        "IncompleteRead"}  # fmt: skip
_WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before the second, third, ... try

T = TypeVar("T")


OnBytes = Callable[[int], None]
"""Called with the bytes that have come since the last call."""


def _ignore(n_bytes: int) -> None:
    pass


class NetworkError(DataError):
    """The Hub does not answer, or not now."""


class MissingFileError(DataError):
    """The repository has no such file."""


@dataclass(frozen=True)
class HubFile:
    """A file of a repository at a commit."""

    repository: str
    path: str
    revision: str
    n_bytes: int = 0
    repo_type: str = "dataset"

    def fetch(self, on_bytes: OnBytes = _ignore) -> Path:
        """Return the local path, downloading into the Hub's cache what is not there.

        Args:
            on_bytes: Called as bytes arrive, with how many.

        Raises:
            DataError: It cannot be had.
        """
        from huggingface_hub import hf_hub_download

        counter = _counting(on_bytes)

        def download() -> str:
            if not self.is_cached():
                _require_reachable()
            return str(
                hf_hub_download(
                    self.repository,
                    self.path,
                    repo_type=self.repo_type,
                    revision=self.revision,
                    tqdm_class=counter,
                )
            )

        return Path(_insist(f"{self.repository}/{self.path}", download))

    def exists(self) -> bool:
        """Tell whether the repository has the file, without fetching it.

        Raises:
            DataError: The Hub does not say.
        """
        from huggingface_hub import file_exists

        return _insist(
            f"{self.repository}/{self.path}",
            lambda: file_exists(
                self.repository, self.path, repo_type=self.repo_type, revision=self.revision
            ),
        )

    def is_cached(self) -> bool:
        """Tell whether the file is in the Hub's cache."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(
            self.repository, self.path, repo_type=self.repo_type, revision=self.revision
        )
        return isinstance(found, str)

    def forget(self) -> None:
        """Remove the file from the Hub's cache."""
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(
            self.repository, self.path, repo_type=self.repo_type, revision=self.revision
        )
        if isinstance(found, str):
            pointer = Path(found)
            blob = pointer.resolve()  # the cache links names to contents
            pointer.unlink(missing_ok=True)
            blob.unlink(missing_ok=True)


def _counting(on_bytes: OnBytes) -> Any:
    """Return a progress bar class for huggingface_hub that draws nothing but tells `on_bytes`.

    A download that is taken up again after a cut tells only of what is new.
    """
    from tqdm.auto import tqdm  # which the Hub's libraries bring along

    told = 0

    class Counter(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})
            self._done = int(kwargs.get("initial") or 0)

        def update(self, n: float | None = 1) -> None:
            nonlocal told
            self._done += int(n or 0)
            if self._done > told:
                on_bytes(self._done - told)
                told = self._done

    return Counter


@dataclass(frozen=True)
class WebFile:
    """A file at an address of its own, kept in the Hub's cache beside the others."""

    url: str
    n_bytes: int
    """Its size, which must be met."""

    def fetch(self, on_bytes: OnBytes = _ignore) -> Path:
        """Return the local path, downloading what is not there.

        Args:
            on_bytes: Called when the file is there, with its size.

        Raises:
            DataError: It cannot be had, or is not of the size it should have.
        """
        path = self._cached()
        if not self.is_cached():
            content = _insist(self.url, self._download)
            if len(content) != self.n_bytes:
                raise DataError(f"{self.url}: {len(content)} bytes, expected {self.n_bytes}")
            atomic.write_bytes(path, content)
            on_bytes(len(content))
        return path

    def is_cached(self) -> bool:
        """Tell whether the file is there, whole."""
        path = self._cached()
        return path.is_file() and path.stat().st_size == self.n_bytes

    def forget(self) -> None:
        """Remove the file from the cache."""
        self._cached().unlink(missing_ok=True)

    def _cached(self) -> Path:
        from huggingface_hub import cached_assets_path

        return cached_assets_path("gptcli", namespace="web") / quote(self.url, safe="")

    def _download(self) -> bytes:
        if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
            raise ConnectionError("offline by HF_HUB_OFFLINE")
        with urllib.request.urlopen(self.url, timeout=30) as answer:
            content: bytes = answer.read(self.n_bytes + 1)
        return content


RemoteFile = HubFile | WebFile


@dataclass(frozen=True)
class HubFiles:
    """The files of a data set's splits at one commit."""

    train: tuple[HubFile, ...]
    validation: tuple[HubFile, ...]
    revision: str


def find_files(repository: str, config: str | None, revision: str | None) -> HubFiles:
    """Resolve a data set to the files of its splits, pinned to a commit.

    Args:
        repository: `org/name`.
        config: The subset; None for the only or default one.
        revision: Branch, tag or commit; None for the newest.

    Raises:
        ConfigError: The configuration is unknown.
        DataError: The data set is unknown, has no training split, or cannot be reached.
    """
    known = _remembered(repository, config, revision)
    if known is not None and re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        return known  # a commit never changes
    try:
        found = _insist(f"hf:{repository}", lambda: _resolve(repository, config, revision))
    except NetworkError:
        if known is not None:
            return known
        raise
    with contextlib.suppress(OSError, GptError):  # a cache that may not be written
        content = json.dumps(dataclasses.asdict(found)).encode()
        atomic.write_bytes(_memory(repository, config, revision), content)
    return found


def _memory(repository: str, config: str | None, revision: str | None) -> Path:
    """Return the file in the Hub's cache that remembers what a data set's files are."""
    from huggingface_hub import cached_assets_path

    folder = cached_assets_path("gptcli", namespace=repository, subfolder="files")
    return folder / quote(f"{config or ''}@{revision or ''}.json", safe="@")


def _remembered(repository: str, config: str | None, revision: str | None) -> HubFiles | None:
    try:
        content = json.loads(_memory(repository, config, revision).read_bytes())
        splits = {
            split: tuple(HubFile(**file) for file in content[split])
            for split in ("train", "validation")
        }
        return HubFiles(**splits, revision=content["revision"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # not there, or not whole: ask the Hub


def _resolve(repository: str, config: str | None, revision: str | None) -> HubFiles:
    """Ask the Hub what `find_files` returns; the errors are those of its libraries."""
    import datasets

    datasets.disable_progress_bars()
    # Warns of a README without metadata, and of each try; what matters is said in our errors.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    _require_reachable()
    builder: Any = datasets.load_dataset_builder(repository, config, revision=revision)
    by_split = builder.config.data_files or {}
    splits = {str(split): [str(url) for url in urls] for split, urls in by_split.items()}
    if not splits.get("train"):
        known = ", ".join(splits) or "none"
        raise DataError(f"hf:{repository}: no training split; the splits are: {known}")
    train = _hub_files(splits["train"])
    return HubFiles(train, _hub_files(splits.get("validation", [])), train[0].revision)


def _hub_files(urls: list[str]) -> tuple[HubFile, ...]:
    """Turn `hf://datasets/org/name@commit/path` into files with their sizes."""
    from huggingface_hub import HfApi

    parsed: list[tuple[str, str, str]] = []
    for url in urls:
        address = url.removeprefix("hf://datasets/")
        repository, _, rest = address.partition("@")
        revision, _, path = rest.partition("/")
        parsed.append((repository, revision, path))
    if not parsed:
        return ()
    repository, revision, _ = parsed[0]
    sizes: dict[str, int] = {}
    for start in range(0, len(parsed), 500):
        paths = [path for _, _, path in parsed[start : start + 500]]
        infos = HfApi().get_paths_info(repository, paths, repo_type="dataset", revision=revision)
        sizes |= {info.path: getattr(info, "size", 0) for info in infos}
    return tuple(HubFile(*file[:1], file[2], file[1], sizes.get(file[2], 0)) for file in parsed)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _kinds(error: Exception) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _insist(what: str, ask: Callable[[], T]) -> T:
    """Ask the Hub, again and later if it is busy or the line was cut.

    huggingface_hub gives up at the first 5xx on a file, and a long preparation meets some.

    Raises:
        DataError: It cannot be had, or not now.
    """
    for seconds in (*_WAITS, None):
        try:
            with atomic.storage_errors(Path(what)):
                return ask()
        except GptError:
            raise
        except Exception as error:
            if seconds is None or not _may_pass(error):
                _explain(what, error)
            time.sleep(seconds)
    raise AssertionError("the last try returns or raises")


def _may_pass(error: Exception) -> bool:
    """Tell whether the same request may succeed in a while: the Hub is busy, or a line was cut.

    No server at all is not worth more waiting: huggingface_hub has asked often enough.
    """
    status = _status(error)
    if status is not None:
        return status == 429 or status >= 500
    return bool(_kinds(error) & _CUT)


def _status(error: BaseException) -> int | None:
    """Return the HTTP status an error, or the one it comes from, came with."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code
    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    if status is None and error.__cause__ is not None:
        return _status(error.__cause__)
    return status


def _require_reachable() -> None:
    """Say at once when nobody answers, where huggingface_hub would ask for half a minute.

    Raises:
        ConnectionError: There is no server at the Hub's address.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return
    address = urlsplit(constants.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=10).close()
    except OSError as error:
        raise ConnectionError(f"no answer from {address.hostname}") from error


def _explain(what: str, error: Exception) -> NoReturn:
    """Raise our error for one of the Hub's libraries, which have many kinds of them."""
    names = _kinds(error)
    if "ValueError" in names and ("BuilderConfig" in str(error) or "Config name" in str(error)):
        raise unknown_part(what, str(error)) from error
    if names & _UNREACHABLE:
        server = "its server" if "://" in what else "the Hub"
        raise NetworkError(
            f"{what}: not in the cache, and {server} cannot be reached",
            "connect to the network; downloads are cached for offline use",
        ) from error
    if (_status(error) or 0) >= 429 or names & _CUT:
        raise NetworkError(
            f"{what}: the Hub is overloaded or the connection dropped ({_first_line(error)})",
            "run the same command again: it resumes",
        ) from error
    if names & {"DatasetNotFoundError", "RepositoryNotFoundError"}:
        message, hint = "no such repository on the Hub, or it is private", "set HF_TOKEN if private"
    elif names & {"RemoteEntryNotFoundError", "EntryNotFoundError"}:
        raise MissingFileError(f"{what}: missing file ({_first_line(error)})") from error
    elif names & {"DataFilesNotFoundError", "EmptyDatasetError"}:
        message, hint = f"missing file ({_first_line(error)})", None
    elif "RuntimeError" in names and "scripts are no longer supported" in str(error):
        message = "this data set is a Python script, which is not run"
        hint = "use a copy of it in Parquet"
    else:
        message, hint = f"{type(error).__name__}: {_first_line(error)}", None
    raise DataError(f"{what}: {message}", hint) from error
