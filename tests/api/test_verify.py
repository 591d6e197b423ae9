"""`gpt train --verify-resume`: exact resume is proved, and what is not exact is found."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gptcli.config import Config
from gptcli.training.optim import Optimizer
from support.runs import Tiny, settings


def test_exact_resume_is_proved_in_fresh_processes(
    data: Path, gpt_process: Any, tiny_set: Any
) -> None:
    done = gpt_process("train", *tiny_set, "--verify-resume", "6", "--json")
    assert done.code == 0, done.err
    assert done.json["differing"] == [] and done.json["steps"] == 6
    assert done.json["stopped_at"] == 3 and done.json["tensors"] > 20
    assert not Path("runs").exists() and not list(Path().glob(".verify-*"))


def test_a_resume_that_is_not_exact_is_found_out(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from gptcli.api import verify

    def careless(config: Config, step: int, *, resume: bool) -> None:
        """Forget the optimizer's state, as many scripts do."""
        load = Optimizer.load_state
        monkeypatch.setattr(Optimizer, "load_state", lambda self, *state: None)
        verify._train_to(config, step, resume)
        monkeypatch.setattr(Optimizer, "load_state", load)

    monkeypatch.setattr(verify, "_train_apart", careless)
    verdict = verify.verify_resume(tiny(), 6, tmp_path / "proof")
    assert verdict.differing
    assert any(name.startswith("model") for name in verdict.differing)


def test_verifying_needs_two_steps(gpt: Any, tiny_set: list[str]) -> None:
    assert gpt("train", *tiny_set, "--verify-resume", "1").code == 2


def test_resuming_is_exact_with_two_threads_as_well(data: Path) -> None:
    shape = ("model.n_embd=128", "train.micro_batch_size=32", "train.max_steps=8")  # worth threads
    words = [word for one in settings(*shape) for word in ("-s", one)]
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "gptcli", "train", *words, "--verify-resume", "4"],
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "exact" in done.stdout, done.stderr
