"""A preparation that is cut off goes on where it stopped, and ends with the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptcli.config import load_config
from gptcli.data.prepare import make_plan, prepare
from gptcli.data.shards import Manifest
from gptcli.errors import ConfigError, DataError, StorageError
from support.folders import content
from support.processes import children_of, forked, until, wait

N_FILES = 12
KILLS = 30


@pytest.fixture
def rows() -> str:
    """A folder of jsonl files, each a unit."""
    return write_rows(lambda text: {"text": text})


def write_rows(row_of: Callable[[str], dict[str, str]]) -> str:
    """Write a folder of jsonl files, each a unit."""
    for index in range(N_FILES):
        texts = [f"file {index} row {row} " * 40 for row in range(60)]
        lines = [json.dumps(row_of(text)) for text in texts]
        path = Path(f"rows/part-{index:02d}.jsonl")
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines) + "\n")
    return "rows"


def prepare_rows(out: str, *sets: str, workers: int = 1) -> Manifest:
    """Prepare the folder."""
    sets = ("data.source=rows", f"data.dir={out}", "data.shard_tokens=20000", *sets)
    return prepare(make_plan(load_config(None, sets)), workers=workers)


def wait_for_parts(child: int) -> None:
    """Wait until a child has begun to write, or has ended."""
    while not any(Path("data/cut").glob(".progress/*")):
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.002)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a fork, which Windows does not have")
@pytest.mark.parametrize("tokenizer", ["gpt2", "bpe", "conversations", "without repeats"])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(rows: str, tokenizer: str) -> None:
    more = "data.dedup=null"
    if tokenizer == "without repeats":
        write_rows(lambda text: {"text": text.replace("row 7 ", "row 5 ")})
        tokenizer, more = "gpt2", "data.dedup=exact"
    if tokenizer == "conversations":
        write_rows(lambda text: {"prompt": text, "completion": text[:90]})
        tokenizer = "gpt2"
    name = f"tokenizer.name={tokenizer}"
    began = time.perf_counter()
    prepare_rows("data/whole", name, more)
    seconds = time.perf_counter() - began
    generator = random.Random(0)
    left_parts = kills = 0
    while kills < KILLS // 2:
        child = forked(lambda: prepare_rows("data/cut", name, more))
        if kills % 2:  # every second one once it writes: training a tokenizer may fill the time
            wait_for_parts(child)
            time.sleep(generator.uniform(0, seconds / 10))
        else:
            time.sleep(generator.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        if (code := wait(child)) != -signal.SIGKILL:  # done before: once more from the beginning
            assert code == 0
            assert content(Path("data/cut")) == content(Path("data/whole"))
            subprocess.run(["rm", "-r", "data/cut"], check=True)
            continue
        kills += 1
        left_parts += Path("data/cut/.progress").is_dir()
        named = Path("data/cut").glob("[tv]*_*.*")
        # No shard has its name before it is whole.
        assert all(path.read_bytes() == (Path("data/whole") / path.name).read_bytes()
                   for path in named)  # fmt: skip
    prepare_rows("data/cut", name, more)
    assert content(Path("data/cut")) == content(Path("data/whole"))
    assert left_parts > 2


def test_finished_units_are_not_done_again(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import gptcli.data.writer as module

    read: list[str] = []
    documents = module.documents

    def failing(unit, *args):  # type: ignore[no-untyped-def]
        if unit.index == 7 and not failed:
            failed.append(7)
            raise StorageError("disk full")
        read.append(unit.name)
        return documents(unit, *args)

    failed: list[int] = []
    monkeypatch.setattr(module, "documents", failing)
    with pytest.raises(StorageError):
        prepare_rows("data/cut")
    # What was read before the error is finished, though it was still being encoded then.
    assert len(read) == 7 and len(list(Path("data/cut/.progress").glob("unit-*"))) == 7
    assert not Path("data/cut/manifest.json").exists()
    prepare_rows("data/cut")
    assert len(read) == N_FILES and len(set(read)) == N_FILES
    prepare_rows("data/whole")
    assert content(Path("data/cut")) == content(Path("data/whole"))
    assert not Path("data/cut/.progress").exists()


@pytest.fixture
def cut(rows: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A preparation that stopped after three units."""
    import gptcli.data.writer as module

    documents = module.documents

    def failing(unit, *args):  # type: ignore[no-untyped-def]
        if unit.index == 3:
            raise KeyboardInterrupt
        return documents(unit, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, "documents", failing)
        prepare_rows("data/cut")
    return Path("data/cut")


def test_an_unfinished_folder_is_not_trained_on(cut: Path) -> None:
    from gptcli.data.shards import read_manifest

    with pytest.raises(DataError, match="is not prepared"):
        read_manifest(cut)


def test_going_on_with_other_settings_is_refused(cut: Path) -> None:
    for change in ("tokenizer.name=bytes", "data.val_fraction=0.3", "seed=2"):
        with pytest.raises(ConfigError, match="unfinished preparation of other data"):
            prepare_rows("data/cut", change)
    assert len(list((cut / ".progress").glob("unit-*.json"))) == 3


def test_a_source_that_changed_meanwhile_is_refused(cut: Path) -> None:
    Path("rows/part-01.jsonl").write_text('{"text": "other"}\n')
    with pytest.raises(ConfigError, match=r"part-01\.jsonl has changed since"):
        prepare_rows("data/cut")


def test_force_begins_anew(cut: Path) -> None:
    plan = make_plan(load_config(None, ["data.source=rows", "data.dir=data/cut", "seed=2"]))
    prepare(plan, force=True)
    plan = make_plan(load_config(None, ["data.source=rows", "data.dir=data/new", "seed=2"]))
    prepare(plan)
    assert content(cut) == content(Path("data/new"))


def test_a_damaged_record_or_shard_is_done_again(cut: Path) -> None:
    (cut / ".progress/unit-000000.json").write_text("{")
    (cut / "train_000001_000.bin").write_bytes(b"short")
    prepare_rows("data/cut")
    prepare_rows("data/whole")
    assert content(cut) == content(Path("data/whole"))


@pytest.mark.parametrize("tokenizer", ["gpt2", "char"])
def test_the_number_of_workers_changes_no_byte(rows: str, tokenizer: str) -> None:
    for workers in (1, 2, 4):
        prepare_rows(f"data/w{workers}", f"tokenizer.name={tokenizer}", workers=workers)
    assert content(Path("data/w1")) == content(Path("data/w2")) == content(Path("data/w4"))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
def test_workers_end_when_their_parent_is_killed(rows: str) -> None:
    code = (
        "import sys; from gptcli.cli import run\n"
        "if __name__ == '__main__': sys.exit(run(sys.argv[1:]))\n"
    )
    Path("start.py").write_text(code)
    big = "word " * 200_000
    Path("rows/big.jsonl").write_text("".join(json.dumps({"text": big}) + "\n" for _ in range(40)))
    words = ["prepare", "rows", "--out", "data/x", "--workers", "2"]
    parent = subprocess.Popen([sys.executable, "start.py", *words], stderr=subprocess.DEVNULL)
    try:
        until(lambda: len(children_of(parent.pid)) >= 2)
        workers = children_of(parent.pid)
    finally:
        parent.kill()
        parent.wait()
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a fork, which Windows does not have")
def test_killed_at_any_write_repeats_are_left_out_all_the_same(rows: str) -> None:
    from gptcli import atomic

    write_rows(lambda text: {"text": text.replace("row 7 ", "row 5 ")})
    how = ("data.dedup=exact", "tokenizer.name=bytes")
    whole = prepare_rows("data/whole", *how)
    assert whole.documents == N_FILES * 59

    def dying_at(call: int) -> None:
        real, left = os.replace, [call]

        def counted(*args: Any) -> None:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            real(*args)

        atomic.os.replace = counted  # type: ignore[assignment]
        prepare_rows("data/cut", *how)

    # Files are named in this order: a recipe, a tokenizer, for each unit its keys, tokens and
    # record, then for each unit its shards and record, and the manifest.
    moments = (1, 2, 4, 5, 6, 20, 39, 40, 41, 60, 86)
    for moment in moments:
        assert wait(forked(lambda: dying_at(moment))) == -signal.SIGKILL, moment  # noqa: B023
        prepare_rows("data/cut", *how)
        assert content(Path("data/cut")) == content(Path("data/whole"))
        subprocess.run(["rm", "-r", "data/cut"], check=True)
    for moment in (1, 3, 9, 14, 9, 6, 6, 6, 4, 4):  # and of one that is killed again and again
        assert wait(forked(lambda: dying_at(moment))) == -signal.SIGKILL  # noqa: B023
    prepare_rows("data/cut", *how)
    assert content(Path("data/cut")) == content(Path("data/whole"))
