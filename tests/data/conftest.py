"""What the tests of the data share: files, and an ordinary user."""

import contextlib
import gzip
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Return a function that writes a file into `tmp_path`, gzipped if its name says so."""

    def write_file(name: str | Path, content: str | bytes, raw: bool = False) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content.encode() if isinstance(content, str) else content
        zipped = path.name.lower().endswith(".gz") and not raw
        path.write_bytes(gzip.compress(data) if zipped else data)
        return path

    return write_file


@pytest.fixture
def without_privileges() -> Callable[[], AbstractContextManager[None]]:
    """Return a context in which this process is an ordinary user, whom permissions stop."""

    @contextlib.contextmanager
    def ordinary_user() -> Iterator[None]:
        if os.geteuid() != 0:
            yield
            return
        os.seteuid(65534)
        try:
            yield
        finally:
            os.seteuid(0)

    return ordinary_user
