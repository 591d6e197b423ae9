"""The text every machine has: the running Python's own library and its language reference.

Knows nothing of units or splits.
"""

import sysconfig
from pathlib import Path

from gptcli.errors import DataError

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def packages() -> dict[str, list[Path]]:
    """Return the library's sources without its tests, by top-level package, in a fixed order.

    Raises:
        DataError: This Python comes without them.
    """
    root = _root()
    found: dict[str, list[Path]] = {}
    for file in sorted(root.rglob("*.py"), key=lambda file: file.relative_to(root).as_posix()):
        parts = file.relative_to(root).parts
        if not _LEFT_OUT.intersection(parts):
            found.setdefault(parts[0].removesuffix(".py"), []).append(file)
    if not found:
        raise DataError(f"{root}: this Python comes without its library's sources")
    return found


def topics_file() -> Path:
    """Return the source file that holds the language reference's prose."""
    return _root() / "pydoc_data" / "topics.py"


def topics() -> list[str]:
    """Return that prose as `help('topics')` shows it, one text a topic."""
    from pydoc_data.topics import topics as by_name

    return [by_name[name] for name in sorted(by_name)]


def _root() -> Path:
    return Path(sysconfig.get_path("stdlib"))
