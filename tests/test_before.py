"""Data and run folders that an earlier state of this version wrote still work.

tests/before holds a data folder and a finished run of 12 steps, as that version left them
(best.pt and last.pt are put back here, as links to the last checkpoint).
"""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from support.commands import Gpt

VAL_LOSS = 3.274165503545241  # as that version evaluated it


@pytest.fixture
def before(tmp_path: Path) -> Path:
    """The run of before, in the working folder, with its data beside it."""
    shutil.copytree(Path(__file__).with_name("before"), tmp_path, dirs_exist_ok=True)
    run = Path("runs/before")
    for name in ("best.pt", "last.pt"):
        os.link(run / "checkpoints/step-00000012.pt", run / name)
    return run


def test_an_old_checkpoint_evaluates_to_the_same_loss(before: Path, gpt: Gpt) -> None:
    done = gpt("eval", "--checkpoint", "before", "--json")
    assert done.code == 0, done.err
    assert done.json["loss"] == pytest.approx(VAL_LOSS, abs=1e-5)
    assert done.json["step"] == 12


def test_an_old_checkpoint_generates(before: Path, gpt: Gpt) -> None:
    done = gpt("generate", "--checkpoint", "best.pt", "--temperature", "0", "--json", "the ")
    assert done.code == 0, done.err
    assert done.json["samples"][0]["text"] == " " * 20


def test_an_old_data_folder_is_found_prepared_and_whole(before: Path, gpt: Gpt) -> None:
    manifest = Path("data/story/manifest.json")
    was = manifest.read_bytes()
    assert gpt("data", "verify", "data/story").code == 0
    assert gpt("prepare", "-c", "run.yaml").code == 0
    assert manifest.read_bytes() == was


def test_an_old_run_resumes_where_it_was_and_ends_as_it_did(before: Path, gpt: Gpt) -> None:
    last = before / "checkpoints/step-00000012.pt"
    expected = torch.load(last, weights_only=True)["model"]
    for name in ("best.pt", "last.pt", "checkpoints/step-00000012.pt"):
        (before / name).unlink()
    done = gpt("train", "-c", "run.yaml", "--resume")
    assert done.code == 0, done.err
    resumed = torch.load(last, weights_only=True)["model"]
    assert resumed.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(resumed[name], expected[name], rtol=0, atol=1e-5)
    lines = (before / "metrics.jsonl").read_text().splitlines()
    steps = [line["step"] for line in map(json.loads, lines) if "loss" in line]
    assert steps == list(range(1, 13))


def test_an_old_run_that_is_finished_continues_to_more_steps(before: Path, gpt: Gpt) -> None:
    done = gpt("train", "-c", "run.yaml", "--resume", "-s", "train.max_steps=16", "--json")
    assert done.code == 0, done.err
    assert done.json["step"] == 16


@pytest.mark.parametrize(
    "command",
    [
        ["runs", "list"],
        ["runs", "show", "before"],
        ["report", "before", "-o", "page.html"],
        ["config", "show", "-c", "runs/before/config.yaml"],
        ["export", "--checkpoint", "before", "--to", "nanogpt", "ckpt.pt"],
    ],
)
def test_an_old_run_is_shown_and_exported(before: Path, gpt: Gpt, command: list[str]) -> None:
    done = gpt(*command)
    assert done.code == 0, done.err


def test_a_finished_run_without_its_links_gets_them_back_and_names_its_best(
    before: Path, gpt: Gpt
) -> None:
    for name in ("best.pt", "last.pt"):
        (before / name).unlink()
    assert gpt("eval", "--checkpoint", "before", "--json").json["step"] == 12
    done = gpt("train", "-c", "run.yaml", "--resume")
    assert done.code == 0 and "best at step 12" in done.out, done.err
    for name in ("best.pt", "last.pt"):
        assert (before / name).samefile(before / "checkpoints/step-00000012.pt")
