"""A loss or gradient that is not finite: kept from the weights, skipped on request, named."""

import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcli.checkpoint import load_checkpoint
from gptcli.config import Config
from gptcli.distributed.process_group import World
from gptcli.errors import NonFiniteError
from gptcli.training import step
from gptcli.training.events import Event, Finished, Started, StepDone, Stopped
from gptcli.training.loop import train
from gptcli.training.optim import clip_gradients
from gptcli.training.signals import StopRequest
from support.runs import Tiny, finish, result_of

STEPS = ("train.max_steps=12", "train.eval_every=12", "train.save_every=1", "train.keep_last=20")


@pytest.fixture(params=[(), ("cpu",)], ids=["update-last", "update-early"])
def poisoned(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[set[int]], None]:
    """Make the gradients of some steps (counted from 1) infinite."""
    monkeypatch.setattr(step, "_EARLY", request.param)  # as on a GPU, the kernel skips by itself

    def poison(steps: set[int]) -> None:
        def clip(parameters: Iterable[torch.Tensor], max_norm: float, world: World) -> torch.Tensor:
            first, *others = parameters
            if current[0] in steps:
                first.grad.view(-1)[0] = torch.inf  # type: ignore[union-attr]
            return clip_gradients([first, *others], max_norm, world)

        monkeypatch.setattr(step, "clip_gradients", clip)

    return poison


current = [0]


def events_of(config: Config, resume: bool = False, until: int = 100) -> Iterator[Event]:
    """Train, keeping count of the step that is being done."""
    stop = StopRequest()
    for event in train(config, resume=resume, stop=stop):
        if isinstance(event, Started):
            current[0] = event.step + 1
        if isinstance(event, StepDone):
            current[0] = event.step + 1
            if event.step >= until:
                stop.request()
        yield event


def weights(config: Config, at: int) -> dict[str, torch.Tensor]:
    return load_checkpoint(config.run_folder / f"checkpoints/step-{at:08d}.pt").model


def test_infinite_gradients_end_a_run_at_once(tiny: Tiny, poisoned: Any) -> None:
    poisoned({5})
    config = tiny(*STEPS)
    with pytest.raises(NonFiniteError, match="gradient is not finite; step 4 was the last") as one:
        list(events_of(config))
    assert one.value.exit_code == 7 and "on_nonfinite=skip" in (one.value.hint or "")
    for path in (config.run_folder / "checkpoints").iterdir():
        loaded = load_checkpoint(path)
        tensors = [
            *loaded.model.values(),
            *(t for s in loaded.optimizer.values() for t in s.values()),
        ]
        assert all(bool(tensor.isfinite().all()) for tensor in tensors)


def test_up_to_three_in_a_row_are_skipped_on_request(tiny: Tiny, poisoned: Any) -> None:
    poisoned({3, 6, 7, 8})
    config = tiny(*STEPS, "train.on_nonfinite=skip", "train.log_every=100")
    events = list(events_of(config))
    steps = [event for event in events if isinstance(event, StepDone)]
    assert [step.step for step in steps if step.skipped] == [3, 6, 7, 8] and len(steps) == 12
    for before, after, same in ((2, 3, True), (5, 8, True), (3, 4, False), (8, 9, False)):
        one, other = weights(config, before), weights(config, after)
        assert all(torch.equal(one[name], other[name]) for name in one) == same
    lines = (config.run_folder / "metrics.jsonl").read_text().splitlines()
    skipped = [json.loads(line) for line in lines if "skipped" in line]
    assert [line["step"] for line in skipped] == [3, 6, 7, 8]
    assert skipped[0]["grad_norm"] is None and skipped[0]["loss"] > 0
    assert "step 6  skipped" in (config.run_folder / "log.txt").read_text()


@pytest.mark.parametrize("stop_at", [4, 5, 6])
def test_a_fourth_in_a_row_ends_the_run_resumed_or_not(
    tiny: Tiny, poisoned: Any, stop_at: int
) -> None:
    poisoned({4, 5, 6, 7})
    config = tiny(*STEPS, "train.on_nonfinite=skip")
    assert isinstance(list(events_of(config, until=stop_at))[-1], Stopped)
    with pytest.raises(NonFiniteError, match=r"step 7: .* step 3 was the last good one"):
        list(events_of(config, resume=True))


def test_an_epoch_that_was_skipped_whole_has_no_loss_of_zero_steps(
    tiny: Tiny, poisoned: Any
) -> None:
    poisoned({1})
    config = tiny("train.max_steps=1", "train.on_nonfinite=skip", "train.eval_every=1")
    assert list(events_of(config))


def test_an_epoch_of_nothing_but_skipped_steps_is_never_the_best(
    tiny: Tiny, poisoned: Any, gpt: Any, corpus: Path
) -> None:
    sets = ("data.val_fraction=0", "tokenizer.name=bytes", "data.dir=data/all")
    assert gpt("prepare", str(corpus), *(w for key in sets for w in ("-s", key))).code == 0
    poisoned({1})
    config = tiny("train.max_steps=1", "train.on_nonfinite=skip", "data.dir=data/all")
    finished = list(events_of(config))[-1]
    assert isinstance(finished, Finished)
    assert finished.best_step is None and finished.summary.best_epoch_loss is None
    assert not (config.run_folder / "best.pt").exists()


@pytest.fixture
def wrecked(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make a step (counted from 1) leave weights that give no finite loss."""

    def wreck(wanted: int) -> None:
        def clip(parameters: Iterable[torch.Tensor], max_norm: float, world: World) -> torch.Tensor:
            first, *others = parameters
            if current[0] == wanted:
                first.data.fill_(1e30)
            return clip_gradients([first, *others], max_norm, world)

        monkeypatch.setattr(step, "clip_gradients", clip)

    return wreck


@pytest.mark.parametrize(("eval_every", "saved"), [(3, 3), (6, 0)])
def test_an_evaluation_that_is_not_finite_ends_the_run_and_is_never_the_best(
    tiny: Tiny, wrecked: Any, eval_every: int, saved: int
) -> None:
    wrecked(6)
    config = tiny(f"train.eval_every={eval_every}")
    events: list[Event] = []
    with pytest.raises(NonFiniteError, match=r"step 6: the validation loss is not finite") as one:
        events.extend(events_of(config))
    assert one.value.exit_code == 7 and "step 5 was the last good one" in one.value.message
    assert f"the last good checkpoint is {config.run_folder}" in one.value.message
    assert json.loads((config.run_folder / "status.json").read_text())["exit_code"] == 7
    # What gave no finite loss is set aside, so that milder settings can resume from before it.
    assert load_checkpoint(config.run_folder / "last.pt").state["step"] == saved
    assert (config.run_folder / "best.pt").exists() == (saved > 0)
    wrecked(0)
    finished = list(events_of(config, resume=True))[-1]
    assert isinstance(finished, Finished) and finished.best_step == 6


def test_the_last_good_step_is_one_that_gave_a_finite_loss(tiny: Tiny, wrecked: Any) -> None:
    """Step 4 wrecks the weights, and step 5 finds out: those of step 3 gave step 4 its loss."""
    wrecked(4)
    config = tiny(*STEPS)
    with pytest.raises(NonFiniteError, match=r"step 5: the loss .* step 3 was .*step-00000003"):
        list(events_of(config))
    assert load_checkpoint(config.run_folder / "last.pt").state["step"] == 3


@pytest.mark.parametrize(("scale", "ends"), [(2.0**30, False), (2.0**60, True)])
def test_steps_that_float16_skips_are_shown_as_skipped(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, scale: float, ends: bool
) -> None:
    scaler = partial(torch.amp.GradScaler, init_scale=scale)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    config = tiny("dtype=float16", "train.max_steps=40", "train.eval_every=40")
    done: list[StepDone] = []
    try:
        done += (event for event in events_of(config) if isinstance(event, StepDone))
    except NonFiniteError:
        assert ends
        return
    assert not ends
    skipped = [event.skipped for event in done]
    assert skipped[0] and 1 <= sum(skipped) <= 20 and not any(skipped[sum(skipped) :])
    assert load_checkpoint(config.run_folder / "last.pt").state["scaler"]["scale"] < scale


def test_an_early_update_gives_the_same_bits(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    last, early = tiny(name="last"), tiny(name="early")
    finish(last)
    monkeypatch.setattr(step, "_EARLY", ("cpu",))
    finish(early)
    assert result_of(early) == result_of(last)
