"""Checkpoints written in the background: the same bytes, and a failure that is not lost."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from gptcli.checkpoint import load_checkpoint
from gptcli.config import Config
from gptcli.errors import StorageError
from gptcli.training.events import Saved, StepDone
from gptcli.training.loop import train
from gptcli.training.setup import Session


def test_in_the_background_training_goes_on_and_ends_with_the_same_bits(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    how = ("train.save_every=2", "train.keep_last=9", "train.max_steps=9", "train.eval_every=9")
    here, behind = tiny(*how, name="here"), tiny(*how, "train.async_save=true", name="behind")
    assert list(train(here))
    held, real = threading.Event(), Session.write

    def write(self: Session, checkpoint: object) -> Path:
        if checkpoint.state["step"] == 2:  # type: ignore[attr-defined]
            assert held.wait(30)
        return real(self, checkpoint)  # type: ignore[arg-type]

    monkeypatch.setattr(Session, "write", write)
    order = []
    for event in train(behind):
        if isinstance(event, Saved | StepDone):
            order.append((type(event).__name__, event.step))
        if isinstance(event, StepDone) and event.step == 3:
            held.set()
    assert order.index(("StepDone", 3)) < order.index(("Saved", 2)) < order.index(("Saved", 4))
    for step in (2, 4, 6, 8, 9):
        name = f"checkpoints/step-{step:08d}.pt"
        one, other = (load_checkpoint(run.run_folder / name) for run in (here, behind))
        assert {**one.state, "seconds": 0} == {**other.state, "seconds": 0}
        assert all(one.model[key].equal(other.model[key]) for key in one.model)
        for key, state in one.optimizer.items():
            assert all(state[part].equal(other.optimizer[key][part]) for part in state)


def test_what_fails_in_the_background_ends_the_run_at_the_next_step(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    how = ("train.save_every=2", "train.eval_every=500", "train.max_steps=500")
    config = tiny(*how, "train.async_save=true")
    failed, real = threading.Event(), Session.write

    def write(self: Session, checkpoint: object) -> Path:
        if checkpoint.state["step"] == 4:  # type: ignore[attr-defined]
            failed.set()
            raise StorageError("the disk is full")
        return real(self, checkpoint)  # type: ignore[arg-type]

    monkeypatch.setattr(Session, "write", write)
    last = 0
    with pytest.raises(StorageError, match="full"):
        for event in train(config):
            last = event.step if isinstance(event, StepDone) else last
            if isinstance(event, StepDone) and event.step == 5:
                assert failed.wait(30)
    assert 5 <= last <= 6
    assert load_checkpoint(config.run_folder / "last.pt").state["step"] == 2


def test_what_fails_at_once_ends_the_run_at_once(
    tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(self: Session, checkpoint: object) -> Path:
        raise StorageError("the disk is full")

    monkeypatch.setattr(Session, "write", write)
    events = train(tiny())
    with pytest.raises(StorageError, match="full"):
        for event in events:
            assert not isinstance(event, StepDone)
