"""The folder in which processes report, and what becomes of it if its launcher is killed."""

import os
import tempfile
from pathlib import Path

import pytest

from gptcli.distributed.launch import _logs


def test_folders_of_killed_launchers_are_removed_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names = ("gptcli-old", "gptcli-young", "gptcli-target", "other")
    old, young, target, other = (tmp_path / name for name in names)
    for folder in (old / "attempt_0", young, target, other):
        folder.mkdir(parents=True)
    (tmp_path / "gptcli-link").symlink_to(other)
    with _logs() as held:
        for folder in (old, held, other):
            os.utime(folder, (0, 0))
        with _logs() as mine:
            assert mine.is_dir() and held.is_dir() and young.is_dir() and other.is_dir()
            assert not old.exists()
    assert not held.exists() and not mine.exists()
