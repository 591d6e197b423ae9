"""Files of Hugging Face Hub data sets: names resolved by `datasets`, fetched one by one.

Each file is pinned to a commit, so a second run reads the same bytes. Which files a data set has
is remembered in the Hub's cache beside them, so that what was found once is found offline.
"""

import contextlib
import dataclasses
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import quote

from gptcli import durable
from gptcli.errors import ConfigError, DataError, GptError

# ConnectionError is Python's and requests', TransportError httpx's.
_UNREACHABLE = {
    "OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectionError", "TransportError"
}  # fmt: skip


@dataclass(frozen=True)
class HubFile:
    """A file of a data set repository at a commit."""

    repository: str
    path: str
    revision: str
    n_bytes: int = 0

    def fetch(self) -> Path:
        """Return the local path, downloading into the Hub's cache what is not there.

        Raises:
            DataError: It cannot be had.
        """
        from huggingface_hub import hf_hub_download

        try:
            return Path(
                hf_hub_download(
                    self.repository, self.path, repo_type="dataset", revision=self.revision
                )
            )
        except Exception as error:
            _explain(f"{self.repository}/{self.path}", error)


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
        found = _resolve(repository, config, revision)
    except GptError:
        raise
    except Exception as error:
        if known is not None and _kinds(error) & _UNREACHABLE:
            return known
        _explain(f"hf:{repository}", error)
    with contextlib.suppress(OSError, GptError):  # a cache that may not be written
        content = json.dumps(dataclasses.asdict(found)).encode()
        durable.write_bytes(_memory(repository, config, revision), content)
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
    # Warns of a README without metadata, which is nobody's fault here.
    logging.getLogger("huggingface_hub.repocard").setLevel(logging.ERROR)
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


def _explain(what: str, error: Exception) -> NoReturn:
    """Raise our error for one of the Hub's libraries, which have many kinds of them."""
    names = _kinds(error)
    if "ValueError" in names and ("BuilderConfig" in str(error) or "Config name" in str(error)):
        raise ConfigError(f"{what}: {_first_line(error)}") from error
    if names & {"DatasetNotFoundError", "RepositoryNotFoundError"}:
        message, hint = "no such data set on the Hub, or it is private", "set HF_TOKEN if private"
    elif names & _UNREACHABLE:
        message = "not in the cache, and the Hub cannot be reached"
        hint = "connect to the network; what is downloaded once is used offline"
    elif names & {"DataFilesNotFoundError", "EmptyDatasetError", "EntryNotFoundError"}:
        message, hint = f"missing file ({_first_line(error)})", None
    elif "RuntimeError" in names and "scripts are no longer supported" in str(error):
        message = "this data set is a Python script, which is not run"
        hint = "use a copy of it in Parquet"
    else:
        message, hint = f"{type(error).__name__}: {_first_line(error)}", None
    raise DataError(f"{what}: {message}", hint) from error
