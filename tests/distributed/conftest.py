"""Several processes that are one run, forked from this one, and the store that torchrun keeps."""

import importlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.processes import Ranks, Start, end, store_process

if not hasattr(os, "fork"):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def compiler() -> None:
    """Import torch's compiler once, before the forks: DDP does, and it takes seconds."""
    importlib.import_module("torch._dynamo")


@pytest.fixture
def start() -> Iterator[Start]:
    """Start `work(rank)` in so many processes; `again` counts as torchrun does when it restarts."""
    stores: list[tuple[int, int]] = []
    pids = Path("stores").resolve()

    def begin(size: int, work: Callable[[int], object], again: int = 0) -> Ranks:
        if not again:
            stores.append(store_process())
            with pids.open("a") as file:  # a launcher that is killed cannot end its own
                file.write(f"{stores[-1][0]}\n")
        return Ranks(size, work, again, stores[-1][1])

    yield begin
    for pid in map(int, pids.read_text().split() if pids.exists() else ()):
        end(pid)
