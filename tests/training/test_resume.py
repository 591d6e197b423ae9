"""Resuming: the best stays the best, the history one history, damaged records no hindrance."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcli.checkpoint import load_checkpoint
from gptcli.config import Config
from gptcli.errors import ConfigError
from gptcli.runs import read_run
from gptcli.training import setup
from gptcli.training.events import Evaluated, Event, Started, StepDone
from gptcli.training.loop import train
from gptcli.training.signals import StopRequest
from support.runs import Tiny, finish, stop_after

WORSE = ("train.max_steps=9", "optim.lr=30", "optim.schedule=constant")


def resume(config: Config) -> list[Event]:
    """Train to the end, from where the run is if there is one."""
    return finish(config, resume=True)


def best_of(config: Config) -> tuple[int, int, float]:
    """Return the step of best.pt, and what it says is the best, by step and loss."""
    state = load_checkpoint(config.run_folder / "best.pt").state
    return state["step"], state["best_step"], state["best_loss"]


def evaluations(config: Config) -> dict[int, float]:
    """Return the validation losses of metrics.jsonl by step."""
    return {row.step: row.val_loss or 0.0 for row in read_run(config.run_folder).evaluations}


def notes(events: list[Event]) -> str:
    """Return what a run says at its start."""
    assert isinstance(events[0], Started)
    return "\n".join(events[0].notes)


@pytest.mark.parametrize("background", ["true", "false"])
def test_a_worse_model_never_takes_the_place_of_the_best(tiny: Tiny, background: str) -> None:
    how = ("train.max_steps=5", "train.eval_every=3", f"train.async_save={background}")
    resume(tiny(*how))
    before = evaluations(tiny())
    assert min(before, key=before.__getitem__) == 5  # the last step, which is no multiple of 3
    resume(tiny(*how, *WORSE))
    after = evaluations(tiny())
    assert list(after) == [3, 5, 6, 9] and after[5] == before[5] < after[9]
    assert best_of(tiny()) == (5, 5, after[5])


def test_a_best_checkpoint_names_itself_and_its_own_loss(tiny: Tiny) -> None:
    config = tiny("train.eval_every=2", "train.max_steps=4")
    for event in train(config):
        if isinstance(event, Evaluated):
            assert event.is_best and best_of(config) == (event.step, event.step, event.val_loss)
    last = load_checkpoint(config.run_folder / "last.pt").state
    assert (last["best_step"], last["best_loss"]) == best_of(config)[1:]


def test_what_was_looked_at_last_stays_in_the_history_of_a_longer_run(tiny: Tiny) -> None:
    resume(tiny("train.max_steps=4"))
    before = read_run(tiny().run_folder)
    stop = StopRequest()
    stop.request()  # even if it is stopped before it looks again
    list(train(tiny("train.max_steps=9"), resume=True, stop=stop))
    assert read_run(tiny().run_folder).evaluations == before.evaluations
    resume(tiny("train.max_steps=9"))
    after = read_run(tiny().run_folder)
    assert [row.step for row in after.evaluations] == [3, 4, 6, 9]
    assert [row.step for row in after.samples] == [4, 9]
    assert after.samples[0] == before.samples[0] and after.evaluations[1] == before.evaluations[1]


def test_short_epochs_are_not_saved_one_by_one_and_the_best_is_still_the_best(
    corpus: Path, gpt: Any, tiny: Tiny
) -> None:
    no_val = ("--out", "data/all", "-s", "tokenizer.name=bytes", "-s", "data.val_fraction=0")
    assert gpt("prepare", str(corpus), *no_val).code == 0
    how = ("data.dir=data/all", "train.tokens_per_step=960", "train.micro_batch_size=6",
           "train.max_steps=60", "train.save_every=25", "train.eval_every=100",
           "model.n_layer=1", "model.n_head=1", "model.n_embd=8",
           "optim.lr=0.3", "optim.schedule=constant")  # fmt: skip
    config, broken = tiny(*how), tiny(*how, name="broken")
    saved = [event.step for event in resume(config) if type(event).__name__ == "Saved"]
    assert saved == [0, 25, 50, 60]
    losses = {row.step: row.train_loss or 0.0 for row in read_run(config.run_folder).epochs}
    best = min(losses, key=losses.__getitem__)
    assert best_of(config) == (best, best, losses[best]) and best not in saved
    stop = StopRequest()
    for event in train(broken, stop=stop):
        if isinstance(event, StepDone) and event.step == best + 1:
            stop.request()
    assert best_of(broken) == best_of(config)
    resume(broken)
    assert best_of(broken) == best_of(config)


def test_other_micro_batches_are_refused_with_the_setting_that_allows_them(tiny: Tiny) -> None:
    resume(tiny("train.max_steps=2"))
    with pytest.raises(ConfigError, match="and tokens_per_step; changed") as caught:
        resume(tiny("train.max_steps=4", "train.micro_batch_size=2"))
    hint = caught.value.hint or ""
    assert hint.endswith("-s train.tokens_per_step=64")
    resume(tiny("train.max_steps=4", "train.micro_batch_size=2", hint.split("-s ")[1]))


def test_a_learning_rate_that_jumps_on_resuming_is_named(tiny: Tiny) -> None:
    resume(tiny("train.max_steps=3"))
    said = notes(resume(tiny("train.max_steps=6")))
    assert "the learning rate changes from 3.00e-04 to" in said and "now covers 6 steps" in said
    constant = ("optim.schedule=constant", "train.max_steps=7")
    assert "to 3.00e-03 at step 6" in notes(resume(tiny(*constant)))
    assert "learning rate" not in notes(resume(tiny(*constant, "train.max_steps=8")))


def test_a_finished_run_says_how_to_make_it_longer(gpt: Any, tiny_set: list[str]) -> None:
    assert gpt("train", *tiny_set).code == 0
    again = gpt("train", *tiny_set, "--resume")
    (said,) = [line for line in again.err_lines if "to train longer" in line]
    command = shlex.split(said.partition(": ")[2])
    longer = gpt(*command[1:])
    assert longer.code == 0 and "12 steps" in longer.out, longer.err


def test_another_machine_is_named_when_a_run_is_resumed(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(tiny(), 2)
    facts = {"torch": "9.9.9", "device": "abacus"}
    monkeypatch.setattr(setup, "machine_facts", lambda device: facts)
    started = next(iter(train(tiny(), resume=True)))
    assert isinstance(started, Started)
    [note] = [note for note in started.notes if "no longer bit-exact" in note]
    assert f"torch ({torch.__version__} then, 9.9.9 now)" in note and "abacus" in note


def test_the_same_machine_is_not_mentioned(tiny: Tiny) -> None:
    stop_after(tiny(), 2)
    started = next(iter(train(tiny(), resume=True)))
    assert isinstance(started, Started)
    assert not [note for note in started.notes if "no longer bit-exact" in note]
