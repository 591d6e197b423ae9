"""Damaged, cut, swapped and strange files: found, or the values in them are the same anyway."""

import os
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcli.checkpoint import Checkpoint, load_checkpoint
from gptcli.config import Config
from gptcli.data.inspection import damaged_shards
from gptcli.data.shards import read_manifest
from gptcli.errors import CheckpointError, DataError
from support.folders import flip, put
from support.runs import LONG, THOROUGH, Figures, Trained, finish, result_of

FLIPS = 5000 if LONG else 200
SMALL = (*THOROUGH, "model.n_layer=1", "model.n_embd=8", "model.n_head=1", "train.keep_last=3")


def newest(config: Config) -> Path:
    """Return the newest checkpoint, freed of best.pt and last.pt, which are links of it."""
    path = max((config.run_folder / "checkpoints").glob("step-*.pt"))
    for name in ("best.pt", "last.pt"):
        (config.run_folder / name).unlink()
    return path


def same(one: Checkpoint, other: Checkpoint) -> bool:
    """Compare all that two checkpoints hold, bit for bit."""
    if one.model.keys() != other.model.keys() or one.optimizer.keys() != other.optimizer.keys():
        return False
    pairs = [(one.model[name], other.model[name]) for name in one.model]
    for name, state in one.optimizer.items():
        if state.keys() != other.optimizer[name].keys():
            return False
        pairs += [(state[key], other.optimizer[name][key]) for key in state]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs) and all(
        getattr(one, key) == getattr(other, key) for key in ("config", "tokenizer", "data", "state")
    )


def outcome(path: Path, original: Checkpoint) -> str:
    """Load a damaged file: "found", or "harmless" if nothing in it has changed."""
    try:
        loaded = load_checkpoint(path)
    except CheckpointError as error:
        assert len(str(error).splitlines()) == 1
        return "found"
    assert same(loaded, original), "wrong values were loaded"
    return "harmless"


def test_flipped_bits_of_a_checkpoint(trained: Trained, figures: Figures) -> None:
    path = newest(trained.copy(*SMALL))
    original, content = load_checkpoint(path), path.read_bytes()
    generator = random.Random("flips")
    found = {"found": 0, "harmless": 0}
    for _ in range(FLIPS):
        flip(path, generator.randrange(8 * len(content)))
        found[outcome(path, original)] += 1
        put(path, content)
    with zipfile.ZipFile(path) as archive:
        directory = range(archive.start_dir, len(content))
    for byte in directory:
        flip(path, 8 * byte + generator.randrange(8))
        found[outcome(path, original)] += 1
        put(path, content)
    assert found["found"] > FLIPS / 2
    figures(f"checkpoint: {FLIPS} random flips and every byte of its directory ({len(directory)}):"
            f" {found['found']} found, {found['harmless']} harmless, 0 wrong")  # fmt: skip


def cut_to(share: float) -> Callable[[Path], None]:
    def cut(path: Path) -> None:
        content = path.read_bytes()
        put(path, content[: int(share * len(content)) if share < 1 else len(content) - 1])

    return cut


def remove(path: Path) -> None:
    path.unlink()


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere.pt")


def endless_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def make_empty(path: Path) -> None:
    put(path, b"")


def make_zeros(path: Path) -> None:
    put(path, bytes(path.stat().st_size))


def other_zip(path: Path) -> None:
    path.unlink()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}.")


WAYS = [cut_to(0), cut_to(0.001), cut_to(0.5), cut_to(0.99), cut_to(1), remove, make_folder,
        make_fifo, dangling_link, endless_link, make_empty, make_zeros, other_zip]  # fmt: skip


@pytest.mark.parametrize("way", range(len(WAYS)))
def test_a_spoiled_checkpoint_is_refused_and_resuming_falls_back(
    data: Path, trained: Trained, gpt: Any, way: int
) -> None:
    broken = trained.copy(*SMALL, until=16)
    path = newest(broken)
    WAYS[way](path)
    done = gpt("eval", "--checkpoint", str(path))
    assert done.code == 4 and len(done.err_lines) <= 3 and "Traceback" not in done.err, done.err
    finish(broken, resume=True)
    assert result_of(broken) == trained.straight(*SMALL)


def test_swapped_checkpoints_lose_nothing(data: Path, trained: Trained) -> None:
    swapped = trained.copy(*SMALL)
    files = sorted((swapped.run_folder / "checkpoints").glob("step-*.pt"))
    aside = files[0].with_suffix(".aside")
    files[0].rename(aside)
    files[-1].rename(files[0])
    aside.rename(files[-1])
    finish(swapped, resume=True)
    assert result_of(swapped) == trained.straight(*SMALL)


def test_when_none_can_be_used_nothing_begins_afresh(
    trained: Trained, gpt: Any, tiny_set: list[str]
) -> None:
    for path in (trained.copy(*SMALL).run_folder / "checkpoints").iterdir():
        put(path, path.read_bytes()[:-5])
    how = [word for one in SMALL for word in ("-s", one)]
    done = gpt("train", *tiny_set, *how, "--resume")
    assert done.code == 4 and len(done.err_lines) <= 3 and "none of its" in done.err


def test_flipped_bits_of_shards_and_manifest(data: Path, gpt: Any, figures: Figures) -> None:
    manifest = read_manifest(data)
    generator = random.Random("shards")
    found = {"at start": 0, "by verify": 0}
    for _ in range(FLIPS):
        shard = data / generator.choice(manifest.shards("train") + manifest.shards("val")).file
        content = flip(shard, generator.randrange(8 * shard.stat().st_size))
        assert damaged_shards(data, manifest), "a flip went unnoticed"
        found["by verify"] += 1
        put(shard, content)
    for bit in range(8 * 12):  # magic, version and count: seen before the first step
        content = flip(shard, bit)
        with pytest.raises(DataError):
            gpt_start(data)
        found["at start"] += 1
        put(shard, content)
    path, harmless = data / "manifest.json", 0
    for _ in range(FLIPS):
        content = flip(path, generator.randrange(8 * path.stat().st_size))
        try:
            assert read_manifest(data) == manifest, "a damaged manifest was taken for good"
            harmless += 1
        except DataError as error:
            assert len(error.message.splitlines()) == 1
        put(path, content)
    figures(f"shards: {found['by verify']} flips found by verify, {found['at start']} of the header"
            f" at the start; manifest: {FLIPS} flips, {FLIPS - harmless} found,"
            f" {harmless} harmless")  # fmt: skip


def gpt_start(data: Path) -> None:
    """Open a data folder as training does."""
    from gptcli.data.shards import TokenReader

    manifest = read_manifest(data)
    for split in ("train", "val"):
        TokenReader(data, manifest, split).close()  # type: ignore[arg-type]


@pytest.mark.parametrize("way", range(len(WAYS)))
@pytest.mark.parametrize("name", ["train_000000_000.bin", "manifest.json", "tokenizer.json"])
def test_a_spoiled_data_folder_is_refused(
    data: Path, gpt: Any, tiny_set: list[str], name: str, way: int
) -> None:
    before = (data / name).read_bytes()
    WAYS[way](data / name)
    done = gpt("train", *tiny_set)
    if name != "train_000000_000.bin" and (data / name).is_file():
        if before.rstrip() == (data / name).read_bytes():
            assert done.code == 0  # the newline at its end means nothing
            return
    assert done.code == 3 and len(done.err_lines) <= 3 and "Traceback" not in done.err, done.err
    assert not Path("runs/tiny/run.json").exists()


def test_swapped_shards_are_found(data: Path, gpt: Any) -> None:
    train, val = data / "train_000000_000.bin", data / "val_000000_000.bin"
    aside = data / "aside"
    shutil.move(train, aside)
    shutil.move(val, train)
    shutil.move(aside, val)
    with pytest.raises(DataError):
        gpt_start(data)
