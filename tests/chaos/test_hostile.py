"""Full disks, and files that somebody made to do harm."""

import json
import os
import resource
import signal
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcli.checkpoint import Checkpoint, load_checkpoint
from gptcli.training import setup
from support.processes import forked, wait
from support.runs import THOROUGH, Figures, Tiny, Trained, finish, result_of


def limited(n_bytes: int, work: Callable[[], None]) -> int:
    """Do something in a child that can write no file beyond a size; return its exit code."""

    def small() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
        work()

    return wait(forked(small))


@pytest.mark.parametrize("what", ["checkpoint", "metrics.jsonl", "log.txt"])
def test_a_full_disk_ends_a_run_and_room_takes_it_up(
    tiny: Tiny, trained: Trained, figures: Figures, what: str
) -> None:
    straight, full = trained.copy(*THOROUGH, name="straight"), tiny(*THOROUGH, name="full")
    size = max(path.stat().st_size for path in straight.run_folder.rglob("*.pt"))
    if what == "checkpoint":
        # The first, without optimizer state, is smaller and still fits.
        limit = size - 1000
    else:
        limit = size + 100_000
        full.run_folder.mkdir(parents=True)
        padding = b"x" * (limit - 600)

        def pad(real: Callable[..., Any] = setup.describe_run) -> None:
            def padded(run: Any, facts: dict[str, Any]) -> None:
                real(run, facts)
                (run.folder / what).write_bytes(padding)

            setup.describe_run = padded

    def work() -> None:
        if what == "log.txt":
            pad()
        if what == "metrics.jsonl":
            real = setup.Session.write

            def write(self: setup.Session, checkpoint: Checkpoint) -> Path:
                path = real(self, checkpoint)
                metrics = self.run.folder / what
                if self.state.step == 3:  # as long as if there had been many steps
                    metrics.write_bytes(metrics.read_bytes().rstrip(b"\n}") + b" " * (
                        limit - metrics.stat().st_size - 300) + b"}\n")  # fmt: skip
                return path

            setup.Session.write = write  # type: ignore[method-assign]
        finish(full)

    assert limited(limit, work) == 5
    for path in (full.run_folder / "checkpoints").iterdir():
        load_checkpoint(path)
    assert json.loads((full.run_folder / "status.json").read_text())["exit_code"] == 5
    assert not list(full.run_folder.rglob(".tmp-*"))
    finish(full, resume=True)
    assert result_of(full) == result_of(straight)
    figures(f"disk full while writing {what}: exit 5, older checkpoints whole, then bit-identical")


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    return tmp_path / "canary"


class Payload:
    """Unpickled by a careless program, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def test_a_pickle_in_a_checkpoint_is_not_run(canary: Path, gpt: Any, run: Path) -> None:
    bad = Path("bad.pt")
    torch.save({"format": "gptcli-checkpoint", "version": 1, "model": Payload(canary)}, bad)
    torch.load(bad, weights_only=False)  # so it would have done it
    assert canary.exists()
    canary.unlink()
    for words in (("eval",), ("generate",)):
        done = gpt(*words, "--checkpoint", str(bad))
        assert done.code == 4 and len(done.err_lines) <= 3
    target = max((run / "checkpoints").iterdir())
    target.unlink()
    bad.rename(target)
    (run / "last.pt").unlink()
    assert gpt("generate", "--checkpoint", str(target)).code == 4
    assert not canary.exists()


def test_a_checkpoint_that_claims_to_be_huge_takes_no_memory(run: Path, gpt: Any) -> None:
    content = torch.load(run / "best.pt", weights_only=True)
    content["config"]["model"]["n_layer"] = 10**9
    torch.save(content, "huge.pt")
    done = gpt("eval", "--checkpoint", "huge.pt")
    assert done.code == 4 and len(done.err_lines) <= 3
    with zipfile.ZipFile("bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", b"\x80\x02" + bytes(200_000_000))
    done = gpt("eval", "--checkpoint", "bomb.pt")
    assert done.code == 4 and len(done.err_lines) <= 3


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n",
        "name: !!python/object/apply:os.system ['touch CANARY']\n",
        "name: !run touch CANARY\n",
        "seed: &s 1\ntrain: {max_steps: *s}\n",
        "<<: {seed: 1}\n",
        "data: " + "[" * 5000,
    ],
)
def test_yaml_is_only_data(text: str, canary: Path, gpt: Any) -> None:
    Path("bad.yaml").write_text(text.replace("CANARY", str(canary)))
    done = gpt("train", "-c", "bad.yaml")
    assert done.code == 2 and len(done.err_lines) <= 3 and "bad.yaml" in done.err
    assert not canary.exists()


STEERING = "\x1b]0;owned\x07\x1b[2J\x9b31m\x07\x08\u202e"


def test_no_text_steers_the_terminal(gpt: Any, tiny_set: list[str], tmp_path: Path) -> None:
    Path("evil.txt").write_text(f"a {STEERING} b\n" * 300)
    Path(f"na{STEERING.replace('/', '')}me.yaml").write_text(f'seed: "{STEERING!r}"\n')
    lines = [
        gpt("prepare", "evil.txt", "-s", "tokenizer.name=bytes", "--out", "data/evil"),
        gpt("data", "peek", "data/evil"),
        gpt("data", "info", "data/evil"),
        gpt("train", *tiny_set, "-s", "data.dir=data/evil"),
        gpt("generate", "--checkpoint", "runs/tiny/last.pt", "-p", "a\x1b[2J\x07 b"),
        gpt("generate", "--checkpoint", f"no{STEERING}such.pt"),
        gpt("train", "-c", f"na{STEERING}me.yaml"),
        gpt("prepare", f"no{STEERING}such.txt"),
    ]
    assert [done.code for done in lines[:5]] == [0] * 5, [done.err for done in lines]
    for done in lines:
        for char in "\x1b\x07\x08\x9b\u202e":
            assert char not in done.out + done.err


@pytest.mark.parametrize("name", ["log.txt", "metrics.jsonl"])
def test_a_planted_link_is_not_written_through(
    tiny_set: list[str], gpt: Any, run: Path, name: str
) -> None:
    victim = Path("victim.txt").absolute()
    victim.write_text("mine")
    (run / name).unlink()
    (run / name).symlink_to(victim)
    done = gpt("train", *tiny_set, "-s", "train.max_steps=9", "--resume")
    assert done.code in (0, 5) and "Traceback" not in done.err
    assert victim.read_text() == "mine"


@pytest.mark.parametrize("name", ["config.yaml", "status.json", "last.pt", "best.pt"])
def test_a_planted_link_is_replaced(tiny_set: list[str], gpt: Any, run: Path, name: str) -> None:
    victim = Path("victim.txt").absolute()
    victim.write_text("mine")
    (run / name).unlink()
    (run / name).symlink_to(victim)
    assert gpt("train", *tiny_set, "-s", "train.max_steps=9", "--resume").code == 0
    assert victim.read_text() == "mine"
    assert not (run / name).is_symlink() or name == "best.pt"


def test_nothing_is_removed_through_a_link(
    tiny_set: list[str], gpt: Any, run: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for step in range(5):
        (other / f"step-{step:08d}.pt").write_bytes(b"somebody's")
    (run / "checkpoints/step-00000001.pt").symlink_to(other / "step-00000001.pt")
    assert gpt("train", *tiny_set, "-s", "train.max_steps=9", "--resume").code == 0
    assert len(list(other.iterdir())) == 5
    (run / "checkpoints").rename(tmp_path / "moved")
    (run / "checkpoints").symlink_to(other)
    done = gpt("train", *tiny_set, "-s", "train.max_steps=12", "--resume")
    assert done.code == 5 and "is a symbolic link" in done.err
    assert len(list(other.iterdir())) == 5


def test_a_shard_that_claims_more_than_it_has(data: Path, gpt: Any, tiny_set: list[str]) -> None:
    shard = data / "train_000000_000.bin"
    content = bytearray(shard.read_bytes())
    content[8:12] = struct.pack("<i", 2**31 - 1)
    shard.write_bytes(content)
    done = gpt("train", *tiny_set)
    assert done.code == 3 and len(done.err_lines) <= 3
