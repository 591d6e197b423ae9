"""What the rows of the crash suite share: the table of figures.

`make chaos` runs the long form and prints one line with figures for each row.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest

_FIGURES = pytest.StashKey[list[str]]()

if not hasattr(os, "fork"):
    collect_ignore_glob = ["test_*.py"]  # Windows has no fork to kill


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_FIGURES] = []


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for line in config.stash.get(_FIGURES, []):
        terminalreporter.write_line(f"chaos: {line}")


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Add a line to the table that is printed at the end."""
    return request.config.stash[_FIGURES].append
