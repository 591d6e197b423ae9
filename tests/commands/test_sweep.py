"""`gpt sweep`: what it prints, returns and refuses, and how it ends early."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

SHORT = ["-s", "model.n_layer=1", "-s", "train.max_steps=2", "-s", "generate.max_new_tokens=1"]


def test_sweep_prints_a_line_for_each_run_and_a_table(gpt: Any, tiny_set: list[str]) -> None:
    words = ["sweep", *tiny_set, *SHORT, "model.n_head=2,3", "--seeds", "2"]
    done = gpt(*words)
    assert done.code == 0, done.err
    assert "\x1b" not in done.err + done.out
    lines = [line for line in done.err_lines if line.startswith("trial ")]
    assert len(lines) == 3  # the second seed of settings that do not fit is not tried
    assert sum("val loss" in line for line in lines) == 2
    head, first, second, last = done.out.splitlines()
    assert head.split() == ["trial", "model.n_head", "val", "loss", "±", "above", "best", "±"]
    assert first.split()[1] == "2" and first.endswith("best")
    assert "not divisible by n_head = 3" in second
    assert last == f"best: gpt train -c {Path('runs/tiny-sweep/best.yaml')}"
    again = gpt(*words)
    assert again.out == done.out and not [x for x in again.err_lines if x.startswith("trial ")]
    found = gpt(*words, "--json").json
    assert list(found) == ["folder", "best", "picture", "trials"]
    assert [one["verdict"] for one in found["trials"]] == ["best", "failed"]
    assert found["trials"][0]["losses"].keys() == {"1337", "1338"}
    listed = gpt("runs", "list", "runs/tiny-sweep", "--json").json["runs"]
    assert len(listed) == 2 and all(run["state"] == "finished" for run in listed)
    refused = gpt(*words[:-1], "3")
    assert refused.code == 2 and "--seeds (2 there, 3 here)" in refused.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["optim.rate=1,2"], "did you mean"),
        (["optim.lr=1e-3,1e-2", "--seeds", "0"], "--seeds"),
        (["optim.lr=1e-3,1e-2", "--seeds", "2000"], "1 to 1,000 are possible"),
        ([], "KEY"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(
    gpt: Any, tiny_set: list[str], words: list[str], told: str
) -> None:
    done = gpt("sweep", *tiny_set, *words)
    assert done.code == 2 and told in done.err and len(done.err_lines) <= 3
    assert not Path("runs").exists()


@pytest.mark.skipif(os.name == "nt", reason="signals are sent as POSIX has them")
def test_ctrl_c_saves_the_run_and_says_how_to_continue(
    gpt: Any, tiny_set: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from gptcli.training.step import Stepper

    step = Stepper.step

    def interrupted(self: Stepper, stopped: Any) -> Any:
        if self.s.state.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, stopped)

    words = ["sweep", *tiny_set, *SHORT, "optim.lr=1e-3,1e-2", "--seeds", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "step", interrupted)
        done = gpt(*words)
    assert done.code == 130 and "stopped at step " in done.err
    assert done.err_lines[-1].startswith("next: gpt sweep ") and "unfinished" in done.out
    assert gpt(*words).code == 0
