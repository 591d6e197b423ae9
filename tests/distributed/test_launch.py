"""The folder in which processes report, and what becomes of it if its launcher is killed."""

import os
import signal
import tempfile
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing import SignalException

from gptcli.distributed.launch import _logs, _signals


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


def test_a_signal_while_the_processes_start_waits_until_all_are_noted() -> None:
    noted = []

    def _start_workers() -> None:  # as torchrun's agent calls it
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.2)
        noted.append("all")

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        with pytest.raises(SignalException), _signals(SignalException):
            _start_workers()
            time.sleep(10)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert noted == ["all"]
