"""What is found out before the first step, and what is kept from the weights."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from gptcli.checkpoint import load_checkpoint
from gptcli.config import Config, load_config
from gptcli.device import available_memory
from gptcli.distributed.process_group import World
from gptcli.errors import ConfigError, MemoryLimitError, NonFiniteError, StorageError
from gptcli.training import memory, setup, spec, step
from gptcli.training.events import Event, Finished, Started, StepDone, Stopped
from gptcli.training.loop import train
from gptcli.training.memory import model_size
from gptcli.training.optim import Optimizer, clip_gradients
from gptcli.training.signals import StopRequest

Tiny = Callable[..., Config]


class Usage(NamedTuple):
    total: int
    used: int
    free: int


STEPS = ("train.max_steps=12", "train.eval_every=12", "train.save_every=1", "train.keep_last=20")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], None]:
    """Make the gradients of some steps (counted from 1) infinite."""

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


# Rows of a micro-batch


def test_auto_needs_to_know_a_step() -> None:
    with pytest.raises(ConfigError, match=r"auto needs train\.tokens_per_step"):
        load_config(None, ["train.micro_batch_size=auto"])


def test_the_most_rows_that_fit_divide_a_step(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny("train.micro_batch_size=auto", "train.tokens_per_step=192",  # 12 rows of 16
                  "model.vocab_size=257")  # fmt: skip
    size = model_size(config)
    monkeypatch.setattr(memory, "memory_bytes", lambda device: 0)

    def fitting(free: float) -> int:
        monkeypatch.setattr(memory, "available_memory", lambda device: int(free))
        return memory.fitting_rows(config, size, "none", 1)

    def needed(rows: int) -> int:
        estimate = memory.estimate_memory(config, size, rows, "none", 1)
        return estimate.total - estimate.program

    share = memory._SHARE
    wanted = (1, 2, 3, 5, 6, 11, 12, 1000)
    assert [fitting((needed(rows) + 9) / share) for rows in wanted] == [1, 2, 3, 4, 6, 6, 12, 12]
    assert fitting(needed(1) + 9) == 1  # it fits, if only just
    with pytest.raises(MemoryLimitError) as caught:
        fitting(needed(1) / 2)
    assert caught.value.exit_code == 8


def test_the_rows_are_settled_once_and_kept(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    how = ("train.micro_batch_size=auto", "train.tokens_per_step=96", "train.max_steps=6")
    monkeypatch.setattr(spec, "fitting_rows", lambda *args: 2)
    events = list(events_of(tiny(*how), until=3))
    started = events[0]
    assert isinstance(started, Started) and started.spec.grad_accum_steps == 3
    assert any("micro_batch_size is 2" in note for note in started.notes)
    monkeypatch.setattr(spec, "fitting_rows", lambda *args: 6)
    resumed = next(events_of(tiny(*how), resume=True))
    assert isinstance(resumed, Started) and resumed.spec.grad_accum_steps == 3
    straight = list(events_of(tiny(*how[1:], "train.micro_batch_size=2", name="straight"), until=3))
    losses = [[e.loss for e in run if isinstance(e, StepDone)] for run in (events, straight)]
    assert losses[0] == losses[1]


def test_memory_of_this_machine_is_known() -> None:
    free = available_memory(torch.device("cpu"))
    assert free is not None and 1 << 26 < free < 1 << 45


# Disk


def test_a_disk_without_room_for_the_checkpoints_is_refused(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny()
    with monkeypatch.context() as patch, pytest.raises(StorageError) as caught:
        patch.setattr(memory.shutil, "disk_usage", lambda path: Usage(10, 0, 1_000_000))
        list(train(config))
    assert caught.value.exit_code == 5 and "keep_last" in (caught.value.hint or "")
    assert "checkpoints of 468 kB need 1.87 MB" in caught.value.message
    assert not list((config.run_folder / "checkpoints").iterdir())
    list(train(config))  # the failure left nothing in the way
    size = sum(path.stat().st_size for path in (config.run_folder / "checkpoints").iterdir())
    assert size < 2_000_000  # so the estimate was not too low
    # What is there already need not be there a second time.
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda path: Usage(10, 0, 2_000_000 - size))
    list(train(tiny("train.max_steps=40"), resume=True))


# Machines


def test_another_machine_is_named_when_a_run_is_resumed(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(events_of(tiny(), until=2))
    facts = {"torch": "9.9.9", "device": "abacus", "threads": 77}
    monkeypatch.setattr(setup, "machine_facts", lambda device: facts)
    started = next(events_of(tiny(), resume=True))
    assert isinstance(started, Started)
    [note] = [note for note in started.notes if "no longer bit-exact" in note]
    assert f"torch ({torch.__version__} then, 9.9.9 now)" in note and "threads" in note


def test_the_same_machine_is_not_mentioned(tiny: Tiny) -> None:
    list(events_of(tiny(), until=2))
    started = next(events_of(tiny(), resume=True))
    assert isinstance(started, Started)
    assert not [note for note in started.notes if "no longer bit-exact" in note]


# Proof


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
    from gptcli.training import verify

    def careless(config: Config, step: int, *, resume: bool) -> None:
        """Forget the optimizer's state, as many scripts do."""
        load = Optimizer.load_state
        monkeypatch.setattr(Optimizer, "load_state", lambda self, *state: None)
        verify._train_to(config, step, resume)
        monkeypatch.setattr(Optimizer, "load_state", load)

    monkeypatch.setattr(verify, "_train_apart", careless)
    verdict = verify.verify_resume(tiny(), 6, tmp_path / "proof")
    assert verdict.differing and verdict.largest > 0
    assert any(name.startswith("model") for name in verdict.differing)


def test_verifying_needs_two_steps(gpt: Any, tiny_set: list[str]) -> None:
    assert gpt("train", *tiny_set, "--verify-resume", "1").code == 2
