"""Ranks that share the work of preparing: the folder is that of one process, to the byte."""

import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from gptcli import cli
from support.folders import content
from support.processes import forked, until, wait

N_FILES = 7


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder of files of different lengths, each a unit."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(N_FILES):
        lines = [json.dumps({"text": f"line {i} of {index} " * (1 + i % 5)}) for i in range(60)]
        (folder / f"part-{index}.jsonl").write_text("\n".join(lines[: 20 + 5 * index]) + "\n")
    return folder


def words(source: Path, out: str, *more: str) -> list[str]:
    """Return a command line that prepares the source."""
    sets = ("tokenizer.name=bpe", "tokenizer.vocab_size=280", "data.val_fraction=0.2")
    return ["prepare", str(source), "--out", out, *(w for s in sets for w in ("-s", s)), *more]


def prepare_share(source: Path, out: str, rank: int, world_size: int) -> None:
    """Prepare a rank's share, and end this process with the exit code."""
    sys.exit(cli.run(words(source, out, "--rank", str(rank), "--world-size", str(world_size))))


@pytest.mark.parametrize("world_size", [1, 2, 4, 9])
def test_any_split_into_ranks_gives_the_same_bytes(gpt: Any, source: Path, world_size: int) -> None:
    assert gpt(*words(source, "whole")).code == 0
    units = 0
    for rank in reversed(range(world_size)):
        share = ("--rank", str(rank), "--world-size", str(world_size), "--json")
        done = gpt(*words(source, "shared", *share))
        assert done.code == 0, done.err
        units += done.json["units"]
        assert not Path("shared/manifest.json").exists()
    assert units == N_FILES
    done = gpt(*words(source, "shared", "--finalize", "--json"))
    assert done.code == 0, done.err
    assert content(Path("shared")) == content(Path("whole"))


def test_ranks_at_once_in_processes_of_their_own(gpt: Any, source: Path) -> None:
    assert gpt(*words(source, "whole")).code == 0
    started = [forked(lambda share=share: prepare_share(source, "shared", share, 3))
               for share in range(3)]  # fmt: skip
    assert [wait(child) for child in started] == [0, 0, 0]
    assert gpt(*words(source, "shared", "--finalize")).code == 0
    assert content(Path("shared")) == content(Path("whole"))


def test_only_what_is_missing_is_done_again(gpt: Any, source: Path) -> None:
    for rank in (0, 2):
        assert gpt(*words(source, "d", "--rank", str(rank), "--world-size", "3")).code == 0
    done = gpt(*words(source, "d", "--finalize"))
    assert done.code == 3 and "2 of 7 units are not prepared yet (1, 4)" in done.err
    before = {path: path.stat().st_mtime_ns for path in Path("d").glob("*.bin")}
    for rank in range(3):
        assert gpt(*words(source, "d", "--rank", str(rank), "--world-size", "3")).code == 0
    assert all(path.stat().st_mtime_ns == changed for path, changed in before.items())
    assert gpt(*words(source, "d", "--finalize")).code == 0
    assert gpt(*words(source, "d", "--finalize")).code == 0  # as often as one likes
    assert gpt(*words(source, "d", "--rank", "1", "--world-size", "3")).code == 0


def test_a_killed_rank_is_run_again(gpt: Any, source: Path) -> None:
    assert gpt(*words(source, "whole")).code == 0

    def slowly() -> None:
        replace = os.replace
        os.replace = lambda *names: (time.sleep(0.1), replace(*names))[1]
        prepare_share(source, "d", 0, 2)

    for n_units in (0, 1, 2):
        child = forked(slowly)
        finished = partial(Path("d").glob, ".progress/unit-*.json")
        until(lambda: Path("d").exists() and len(list(finished())) >= n_units)  # noqa: B023
        os.kill(child, signal.SIGKILL)
        assert wait(child) == -signal.SIGKILL
    for rank in range(2):
        assert gpt(*words(source, "d", "--rank", str(rank), "--world-size", "2")).code == 0
    assert gpt(*words(source, "d", "--finalize")).code == 0
    assert content(Path("d")) == content(Path("whole"))


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--rank", "0"], "must be used together"),
        (["--world-size", "2"], "must be used together"),
        (["--rank", "2", "--world-size", "2"], "expected 0 to 1"),
        (["--rank", "0", "--world-size", "2", "--finalize"], "cannot be combined"),
        (["--rank", "0", "--world-size", "2", "--force"], "cannot be combined with --rank"),
        (["--finalize", "--dry-run"], "cannot be combined with --rank"),
    ],
)
def test_options_of_ranks_that_make_no_sense(
    gpt: Any, source: Path, more: list[str], part: str
) -> None:
    done = gpt(*words(source, "d", *more))
    assert done.code == 2 and part in done.err
    assert not Path("d").exists()


def test_ranks_of_different_recipes_are_refused(gpt: Any, source: Path) -> None:
    assert gpt(*words(source, "d", "--finalize")).code == 3
    assert gpt(*words(source, "d", "--rank", "0", "--world-size", "2")).code == 0
    other = ("--rank", "1", "--world-size", "2", "-s", "seed=5")
    done = gpt(*words(source, "d", *other))
    assert done.code == 2 and "seed" in done.err
    (source / "part-0.jsonl").write_text('{"text": "changed"}\n')
    assert gpt(*words(source, "d", "--rank", "1", "--world-size", "2")).code == 0
    done = gpt(*words(source, "d", "--finalize"))
    assert done.code == 2 and "part-0.jsonl has changed" in done.err
