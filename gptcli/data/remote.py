"""Files behind an address: https by Python, s3:// and gs:// by pyarrow; whole, and checked.

What is downloaded lies in the Hub's cache: files of text for `gpt prepare`, and the shards of data
folders for training, of which the least recently used make room. Addresses are printed and stored
with runs, so those with a password or a key are refused.
"""

import contextlib
import functools
import hashlib
import logging
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from gptcli import atomic
from gptcli.config.schema import DataConfig
from gptcli.data.hub import Cached, HubFile, NetworkError, OnBytes, require_reachable, retry
from gptcli.data.presets import is_address
from gptcli.errors import ConfigError, DataError
from gptcli.formatting import size

_STORES = ("s3", "gs")
_SECRET = re.compile(r"(?i)sig(nature)?$|token|secret|credential|passw|auth|(^|[-_.])(api)?key$")
_READ_BYTES = 1 << 20
_MOST_SMALL_BYTES = 1 << 30  # of a manifest or a tokenizer
_GB = 1_000_000_000
_CACHE_GB = DataConfig().cache_gb
_log = logging.getLogger("gptcli")


def require_address(name: str, key: str) -> str:
    """Return an address as it may be stored: with a known scheme, and without secrets.

    Raises:
        ConfigError: It is another; what is secret in it is not repeated.
    """
    scheme = name.partition("://")[0].lower()
    if scheme not in ("http", "https", *_STORES):
        raise ConfigError(
            f"{key}: {scheme}:// is not supported", "use a path, https://, s3:// or gs://"
        )
    try:
        parts = urlsplit(name)
        queries = [query for query, _ in parse_qsl(parts.query, keep_blank_values=True)]
    except ValueError as error:
        raise ConfigError(f"{key}: not an address ({error})") from None
    if "@" in parts.netloc or any(_SECRET.search(query) for query in queries):
        hint = "download it yourself: curl 'ADDRESS' | gpt prepare - --out DIR"
        if scheme in _STORES:
            hint = "leave it out and set it as for the tools of that store, e.g. AWS_PROFILE"
        raise ConfigError(
            f"{key}: the address holds a password or key, which would be stored with the run", hint
        )
    if key == "data.dir" and (parts.query or parts.fragment):
        raise ConfigError(f"{key}: the address of a folder has no ? or #")
    return name


@functools.cache
def _client(scheme: str, bucket: str) -> Any:
    """Return the client of a store, with the credentials that its tools find."""
    from pyarrow import fs

    is_public = os.environ.get(f"{'AWS' if scheme == 's3' else 'GS'}_NO_SIGN_REQUEST", "") != ""
    try:
        if scheme == "gs":
            require_reachable("https://storage.googleapis.com")  # the client would ask for ever
            return fs.GcsFileSystem(anonymous=is_public)
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        if endpoint or not region:
            require_reachable(endpoint or "https://s3.us-east-1.amazonaws.com")
        region = region or ("us-east-1" if endpoint else fs.resolve_s3_region(bucket))
        how: dict[str, Any] = {"anonymous": is_public, "region": region, "connect_timeout": 10}
        if endpoint:
            how["scheme"], _, how["endpoint_override"] = endpoint.rstrip("/").partition("://")
        return fs.S3FileSystem(**how)
    except ImportError as error:
        raise ConfigError(f"{scheme}:// is not part of pyarrow on this system") from error


@contextlib.contextmanager
def _store(url: str) -> Iterator[tuple[Any, str]]:
    """Yield the client of an address and the path there; its errors become Python's."""
    scheme, _, path = url.partition("://")
    try:
        yield _client(scheme.lower(), path.partition("/")[0]), path.rstrip("/")
    except OSError as error:
        kinds = {
            r"ACCESS_DENIED|403|PERMISSION_DENIED|401": PermissionError,
            r"curlCode: [67]\b": ConnectionError,  # no such host, or no server there
            r"NETWORK_CONNECTION|curlCode|UNAVAILABLE": ConnectionResetError,
        }
        for pattern, kind in kinds.items():
            if re.search(pattern, str(error)):
                raise kind(str(error)[:200]) from error
        raise


def _is_web(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def _ask(url: str, **headers: str) -> Any:
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30)
    except urllib.error.HTTPError as error:
        error.close()
        raise


def _stat(url: str) -> tuple[int, str]:
    """Return the size of a file, 0 if it is unknown, and what changes when the file does."""
    if _is_web(url):
        with _ask(url) as answer:
            headers = answer.headers
            version = headers.get("ETag") or headers.get("Last-Modified") or ""
            return int(headers.get("Content-Length") or 0), version
    with _store(url) as (store, path):
        info = store.get_file_info(path)
        if not info.is_file:
            raise FileNotFoundError(url)
        return info.size, str(info.mtime_ns)


@contextlib.contextmanager
def _opened(url: str, start: int) -> Iterator[tuple[BinaryIO, int]]:
    """Open a file at a position; also yield where it really is: a server may begin at 0."""
    if not _is_web(url):
        with _store(url) as (store, path), store.open_input_file(path) as file:
            file.seek(start)
            yield file, start
        return
    with _ask(url, **({"Range": f"bytes={start}-"} if start else {})) as answer:
        yield answer, start if answer.status == 206 else 0


def download(
    url: str,
    target: Path,
    n_bytes: int = 0,
    sha256: str | None = None,
    on_bytes: OnBytes = lambda n_bytes: None,
) -> None:
    """Download a file, or what is missing of it; `target` appears when it is complete.

    Args:
        url: Where it is.
        target: Where it goes; processes that want the same file wait for the first one.
        n_bytes: Its size; 0 if it is unknown.
        sha256: Its hash, if it is known.
        on_bytes: Called with the bytes that arrived.

    Raises:
        DataError: The server cannot be reached or sends another file.
        StorageError: The disk is full.
    """
    import filelock

    atomic.make_folder(target.parent)
    part = target.with_name(f".{target.name}.part")
    with atomic.create_errors(target), filelock.FileLock(target.with_name(f".{target.name}.lock")):
        if target.exists():
            return
        retry(url, lambda: _download(url, part, n_bytes, on_bytes))
        with part.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 is not None and found != sha256:
            part.unlink()
            raise DataError(
                f"{url}: content does not have the hash of the manifest",
                "prepare the folder again and upload all of it",
            )
        atomic.sync_file(part)
        os.replace(part, target)
        atomic.sync_folder(target.parent)


def _download(url: str, part: Path, n_bytes: int, on_bytes: OnBytes) -> None:
    there = part.stat().st_size if part.exists() and n_bytes else 0
    if n_bytes and there == n_bytes:
        return
    with _opened(url, there) as (file, start), part.open("r+b" if there else "wb") as out:
        out.seek(start)
        out.truncate()
        while data := file.read(_READ_BYTES):
            out.write(data)
            on_bytes(len(data))
            if n_bytes and out.tell() > n_bytes:
                break
        there = out.tell()
    if n_bytes and there > n_bytes:
        part.unlink()
        raise DataError(f"{url}: larger than the {n_bytes:,} bytes it should have")
    if there < n_bytes:
        raise ConnectionResetError(f"{there:,} of {n_bytes:,} bytes arrived")


def _cache(name: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "gptcli" / name


# A unit's hash in a manifest covers the text of this class: fields and names are a format.
@dataclass(frozen=True)
class StoredFile(Cached):
    """A file of text behind an address, as it was when it was found.

    Without a version it is one of a known size, whatever the server says.
    """

    url: str
    n_bytes: int
    version: str | None

    def __str__(self) -> str:
        known = f"WebFile(url={self.url!r}, n_bytes={self.n_bytes})"
        return known if self.version is None else repr(self)

    @property
    def path(self) -> str:
        """Its path, whose suffix tells its kind."""
        return urlsplit(self.url).path

    def fetch(self, on_bytes: OnBytes = lambda n_bytes: None) -> Path:
        """Return the local path, after downloading what is missing."""
        from huggingface_hub import constants

        path, seen = self._place, (self.n_bytes, self.version)
        if not path.is_file():
            if self.version is None and constants.HF_HUB_OFFLINE:
                raise NetworkError(f"{self.url}: not in the cache, and HF_HUB_OFFLINE is set")
            download(self.url, path, self.n_bytes, on_bytes=on_bytes)
            if self.version is not None and retry(self.url, lambda: _stat(self.url)) != seen:
                path.unlink(missing_ok=True)
                raise DataError(f"{self.url}: changed meanwhile", "run the command again")
        return path

    def _cached(self) -> Path | None:
        return self._place if self._place.is_file() else None

    @property
    def _place(self) -> Path:
        if self.version is None:
            return _cache("web") / "default" / quote(self.url, safe="")
        mark = hashlib.sha256(f"{self.url}\0{self.version}".encode()).hexdigest()[:16]
        return _cache("text") / f"{mark}-{quote(PurePosixPath(self.path).name[-60:])}"


RemoteFile = HubFile | StoredFile


def files_at(url: str) -> list[StoredFile]:
    """Return the files that an address names: one, or those of a folder or glob in a store.

    Raises:
        DataError: It is not there, or the server cannot be reached.
    """
    if _is_web(url):
        return [StoredFile(url, *retry(url, lambda: _stat(url)))]

    def find() -> list[StoredFile]:
        from pyarrow import fs

        base = re.split(r"[^/]*[*?]", url)[0]  # a glob's fixed part
        with _store(base) as (store, path):
            infos = [store.get_file_info(path)]
            if not infos[0].is_file:
                infos = store.get_file_info(fs.FileSelector(path, True, recursive=True))
            scheme = url.partition("://")[0]
            files = [(f"{scheme}://{i.path}", i.size, str(i.mtime_ns)) for i in infos if i.is_file]
        return [StoredFile(*file) for file in sorted(files)]

    found = retry(url, find)
    if "*" in url or "?" in url:
        kinds = {"**/": "(.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
        parts = re.findall(r"\*\*/?|[*?]|[^*?]+", url)
        pattern = re.compile("".join(kinds.get(part) or re.escape(part) for part in parts))
        found = [file for file in found if pattern.fullmatch(file.url)]
    return [file for file in found if not re.search(r"/\.[^/]+", file.path)]


def folder_of(url: str) -> Path:
    """Return the folder of this machine that stands for a data folder behind an address."""
    name = quote(url.rstrip("/"), safe="")
    if len(name) > 200:
        raise ConfigError(f"data.dir: an address of more than 200 characters: {url}")
    return _cache("shards") / name


def address_of(folder: Path) -> str | None:
    """Return the address that a folder of this machine stands for, None if it is an own one."""
    url = unquote(folder.name)
    return url if is_address(url) and folder == folder_of(url) else None


@functools.cache  # once in a process, so that all of it sees the same data
def refresh(folder: Path, names: tuple[str, ...]) -> None:
    """Copy the small files of a data folder from its address, if the folder stands for one.

    If the first has changed, the shards that were copied are removed. Without a connection what
    was copied before is used.
    """
    if (url := address_of(folder)) is None:
        return

    def read(name: str) -> bytes:
        with _opened(f"{url}/{name}", 0) as (file, _):
            return file.read(_MOST_SMALL_BYTES)

    first = folder / names[0]
    try:
        contents = {name: retry(f"{url}/{name}", functools.partial(read, name)) for name in names}
    except NetworkError:
        if first.exists():
            return
        raise
    if first.exists() and first.read_bytes() == contents[names[0]]:
        return
    atomic.make_folder(folder)
    for path in folder.iterdir():
        path.unlink(missing_ok=True)
    for name in reversed(names):
        atomic.write_bytes(folder / name, contents[name])


def fetch(path: Path, n_bytes: int, sha256: str, cache_gb: float = _CACHE_GB) -> None:
    """Copy a file of a data folder from its address, unless it is there; others make room.

    Raises:
        ConfigError: It is larger than the cache.
        DataError: The server cannot be reached, or the file is not the one of the manifest.
    """
    url = address_of(path.parent)
    if url is None:
        return
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size == n_bytes:
            os.utime(path)  # which tells when it was used last
            return
        path.unlink()
    _make_room(n_bytes, cache_gb)
    _log.info(f"downloading {path.name}, {size(n_bytes)}")
    download(f"{url}/{quote(path.name)}", path, n_bytes, sha256)


def require_room(what: str, n_bytes: int, cache_gb: float) -> None:
    """Refuse, with a ConfigError that says which size is enough, what a cache cannot hold.

    In random order it would be downloaded at every step.
    """
    if n_bytes > cache_gb * _GB:
        enough = -(-n_bytes // _GB)
        raise ConfigError(
            f"data.cache_gb: {what} takes {size(n_bytes)}, the cache of shards {cache_gb:g} GB",
            f"-s data.cache_gb={enough}, if the disk has room",
        )


def _make_room(n_bytes: int, cache_gb: float) -> None:
    """Remove the shards that were used least recently until `n_bytes` more fit."""
    found = []
    for path in _cache("shards").glob("*/*.bin"):
        with contextlib.suppress(FileNotFoundError):
            stat = path.stat()
            found.append((stat.st_mtime_ns, path, stat.st_size))
    total = sum(n for _, _, n in found) + n_bytes
    for _, path, n in sorted(found):
        if total <= cache_gb * _GB:
            return
        path.unlink(missing_ok=True)
        total -= n
