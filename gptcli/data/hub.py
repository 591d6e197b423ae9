"""Files of the Hugging Face Hub: datasets resolved by `datasets`, downloaded one file at a time.

Each file is pinned to a commit, so a second run reads the same bytes. The list of a dataset's files
is kept in the Hub's cache beside them, so that what was found once is found offline.
"""

import contextlib
import logging
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, urlsplit

from pydantic import TypeAdapter

from gptcli import atomic
from gptcli.data.presets import unknown_part
from gptcli.errors import DataError, GptError

# Errors by the names of their classes: importing the libraries that define them takes a second.
# ConnectionError is Python's and requests', TransportError httpx's.
_UNREACHABLE = {
    "OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectionError", "TransportError",
    "URLError",
}  # fmt: skip
_DROPPED = {"ReadError", "RemoteProtocolError", "TimeoutException", "ChunkedEncodingError",
            "IncompleteRead", "TimeoutError", "ConnectionResetError"}  # fmt: skip
_MISSING = {"RemoteEntryNotFoundError", "EntryNotFoundError", "FileNotFoundError",
            "EmptyDatasetError"}  # fmt: skip
# Seconds before the second, third, ... try: huggingface_hub gives up at the first 5xx on a file,
# and a long preparation meets some.
_WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)

T = TypeVar("T")

OnBytes = Callable[[int], None]  # is called with the bytes that have arrived since the last call


class NetworkError(DataError):
    """The Hub does not answer, or not now."""


class MissingFileError(DataError):
    """The repository has no such file."""


class Cached:
    """A file on the network that has a place in the Hub's cache."""

    def _cached(self) -> Path | None:
        raise NotImplementedError

    def is_cached(self) -> bool:
        """Tell whether the file is in the cache."""
        return self._cached() is not None

    def forget(self) -> None:
        """Remove the file from the cache."""
        if (path := self._cached()) is not None:
            blob = path.resolve()  # the Hub's cache links names to contents
            path.unlink(missing_ok=True)
            blob.unlink(missing_ok=True)


# A unit's hash in a manifest covers the repr of this class: fields and names are a format.
@dataclass(frozen=True)
class HubFile(Cached):
    """A file of a repository at a commit."""

    repository: str
    path: str
    revision: str
    n_bytes: int = 0
    repo_type: str = "dataset"

    def fetch(self, on_bytes: OnBytes = lambda n_bytes: None) -> Path:
        """Return the local path, after downloading what is missing; a DataError if that fails."""
        import huggingface_hub

        counter = _counter(on_bytes)

        def download() -> str:
            if not self.is_cached():
                require_reachable()
            return str(self._call(huggingface_hub.hf_hub_download, tqdm_class=counter))

        return Path(retry(f"{self.repository}/{self.path}", download))

    def exists(self) -> bool:
        """Tell whether the repository has the file, without downloading it."""
        import huggingface_hub

        name = f"{self.repository}/{self.path}"
        return bool(retry(name, lambda: self._call(huggingface_hub.file_exists)))

    def _cached(self) -> Path | None:
        import huggingface_hub

        found = self._call(huggingface_hub.try_to_load_from_cache)
        return Path(found) if isinstance(found, str) else None

    def _call(self, function: Callable[..., Any], **options: Any) -> Any:
        options |= {"repo_type": self.repo_type, "revision": self.revision}
        return function(self.repository, self.path, **options)


def _counter(on_bytes: OnBytes) -> Any:
    """Return a progress bar class that draws nothing and reports new bytes to `on_bytes`."""
    from tqdm.auto import tqdm  # a dependency of the Hub's libraries

    n_reported = 0

    class Counter(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})
            self._n_bytes = int(kwargs.get("initial") or 0)  # of a download that is resumed

        def update(self, n: float | None = 1) -> None:
            nonlocal n_reported
            self._n_bytes += int(n or 0)
            if self._n_bytes > n_reported:
                on_bytes(self._n_bytes - n_reported)
                n_reported = self._n_bytes

    return Counter


@dataclass(frozen=True)
class HubFiles:
    """The files of a dataset's splits at one commit."""

    train: tuple[HubFile, ...]
    validation: tuple[HubFile, ...]
    revision: str
    fields: tuple[str, ...] = ()  # of its rows, where the dataset says so


def find_files(repository: str, config: str | None, revision: str | None) -> HubFiles:
    """Resolve a dataset to the files of its splits, pinned to a commit.

    Args:
        repository: `org/name`.
        config: The subset; None for the only or default one.
        revision: Branch, tag or commit; None for the newest.
    """
    from huggingface_hub import cached_assets_path

    folder = cached_assets_path("gptcli", namespace=repository, subfolder="files")
    memory = folder / quote(f"{config or ''}@{revision or ''}.json", safe="@")
    known, form = None, TypeAdapter(HubFiles)
    with contextlib.suppress(OSError, ValueError):  # missing or damaged: ask the Hub
        known = form.validate_json(memory.read_bytes())
    if known is not None and re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        return known  # a commit never changes
    try:
        files = retry(f"hf:{repository}", lambda: _resolve(repository, config, revision))
    except NetworkError:
        if known is not None:
            return known
        raise
    with contextlib.suppress(OSError, GptError):  # a cache that may not be written
        atomic.write_bytes(memory, form.dump_json(files))
    return files


def _resolve(repository: str, config: str | None, revision: str | None) -> HubFiles:
    """Ask the Hub what `find_files` returns; the errors are those of its libraries."""
    import datasets

    datasets.disable_progress_bars()
    # It warns of a README without metadata, and of each try; our errors say what matters.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    require_reachable()
    builder: Any = datasets.load_dataset_builder(repository, config, revision=revision)
    splits = {
        str(split): [str(url) for url in urls]
        for split, urls in (builder.config.data_files or {}).items()
    }
    if not splits.get("train"):
        known = ", ".join(splits) or "none"
        raise DataError(f"hf:{repository}: no training split; the splits are: {known}")
    train = _hub_files(splits["train"])
    validation = _hub_files(splits.get("validation", []))
    return HubFiles(train, validation, train[0].revision, tuple(builder.info.features or ()))


def _hub_files(urls: list[str]) -> tuple[HubFile, ...]:
    """Turn `hf://datasets/org/name@commit/path` into files with their sizes."""
    from huggingface_hub import HfApi

    if not urls:
        return ()
    parts = [url.removeprefix("hf://datasets/").partition("@") for url in urls]
    repository, _, rest = parts[0]
    revision = rest.partition("/")[0]
    paths = [rest.partition("/")[2] for _, _, rest in parts]
    sizes: dict[str, int] = {}
    for start in range(0, len(paths), 500):
        chunk = paths[start : start + 500]
        infos = HfApi().get_paths_info(repository, chunk, repo_type="dataset", revision=revision)
        sizes |= {info.path: getattr(info, "size", 0) for info in infos}
    return tuple(HubFile(repository, path, revision, sizes.get(path, 0)) for path in paths)


def retry(name: str, ask: Callable[[], T]) -> T:
    """Ask a server, and again later if it is overloaded or the connection drops."""
    for seconds in (*_WAITS, None):
        try:
            with atomic.storage_errors(Path(name)):
                return ask()
        except GptError:
            raise
        except Exception as error:
            if seconds is None or not _is_temporary(error):
                raise _explained(name, error) from error
            time.sleep(seconds)
    raise AssertionError("the last try returns or raises")


def _is_temporary(error: Exception) -> bool:
    """Tell whether the same request may succeed later; with no server at all it will not."""
    if (status := _status(error)) is not None:
        return status == 429 or status >= 500
    return bool(_class_names(error) & _DROPPED)


def _class_names(error: Exception) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _status(error: BaseException | None) -> int | None:
    """Return the HTTP status of an error or of its cause."""
    if error is None:
        return None
    if isinstance(error, urllib.error.HTTPError):
        return error.code
    status: int | None = getattr(getattr(error, "response", None), "status_code", None)
    return _status(error.__cause__) if status is None else status


def require_reachable(endpoint: str | None = None) -> None:
    """Raise a ConnectionError at once if no server answers: libraries would ask for long."""
    from huggingface_hub import constants

    if urllib.request.getproxies() or (endpoint is None and constants.HF_HUB_OFFLINE):
        return
    address = urlsplit(endpoint or constants.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=10).close()
    except OSError as error:
        raise ConnectionError(f"no answer from {address.hostname}") from error


def _explained(name: str, error: Exception) -> GptError:
    """Return our error for one of the Hub's libraries, which have many kinds."""
    kinds, text, status = _class_names(error), str(error), _status(error)
    is_address = "://" in name
    server = "its server" if is_address else "the Hub"
    reason = (text.strip() or type(error).__name__).splitlines()[0][:200]
    if "ValueError" in kinds and ("BuilderConfig" in text or "Config name" in text):
        return unknown_part(name, text)
    if is_address and (status in (401, 403) or "PermissionError" in kinds):
        hint = "set your credentials as for the tools of that store, or download it yourself"
        return DataError(f"{name}: its server refuses to send it ({reason})", hint)
    if kinds & {"DatasetNotFoundError", "RepositoryNotFoundError"}:
        message = f"{name}: no such repository on the Hub, or it is private"
        return DataError(message, "set HF_TOKEN if it is private")
    if (is_address and status == 404) or (kinds & _MISSING and not kinds & _UNREACHABLE):
        return MissingFileError(f"{name}: no such file" + f" ({reason})" * (not is_address))
    if _is_temporary(error) and (is_address or not kinds & _UNREACHABLE):
        return NetworkError(
            f"{name}: {server} is overloaded or the connection dropped ({reason})",
            "run the same command again: it resumes",
        )
    if kinds & _UNREACHABLE:
        return NetworkError(
            f"{name}: not in the cache, and {server} cannot be reached",
            "connect to the network; downloads are cached for offline use",
        )
    if "RuntimeError" in kinds and "scripts are no longer supported" in text:
        message = f"{name}: this dataset is a Python script, which is not run"
        return DataError(message, "use a copy of it in Parquet")
    return DataError(f"{name}: {type(error).__name__}: {reason}")
