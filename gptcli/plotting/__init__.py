"""Pictures of runs: one source of curves, figures for files, the report page."""

from collections.abc import Sequence
from pathlib import Path

from gptcli.errors import ConfigError


def require_ending(file: Path, endings: Sequence[str], what: str) -> str:
    """Return the ending of a file to write, in lower case.

    Raises:
        ConfigError: It is none of `endings`, or the file is a folder.
    """
    if file.is_dir():
        raise ConfigError(f"{file} is a folder, not a file")
    if file.suffix.lower() not in endings:
        raise ConfigError(f"{file}: not {what}", f"end it in one of {', '.join(endings)}")
    return file.suffix.lower()
