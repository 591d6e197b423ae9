"""Timed steps leave no trace; the threads, the compiling and the budget that they settle hold."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcli.checkpoint import load_checkpoint
from gptcli.config import Config
from gptcli.config.yaml import read_yaml
from gptcli.distributed.process_group import SINGLE_PROCESS
from gptcli.runs.folder import ReadOnlyRun
from gptcli.training.calibrate import seconds_per_step, steps_within
from gptcli.training.events import Finished, Started
from gptcli.training.loop import train
from gptcli.training.plan import Plan, plan_with_steps
from gptcli.training.setup import Session, set_up
from gptcli.training.signals import StopRequest
from gptcli.training.spec import settle
from gptcli.training.step import Stepper
from support.runs import Tiny, finish, result_of, stop_after

BUDGET = ("train.max_steps=null", "train.max_minutes=0.03")  # 1.8 seconds
KINDS = {
    "adamw": ("optim.name=adamw", "model.dropout=0.1"),
    "muon": ("optim.name=muon", "train.tokens_per_step=192"),
}


@contextlib.contextmanager
def session_of(config: Config) -> Iterator[Session]:
    """Set up a run that writes nothing."""
    run = ReadOnlyRun(config.run_folder)
    with contextlib.closing(set_up(run, config, SINGLE_PROCESS, resume=False)) as session:
        yield session


def started(events: list[Any]) -> Started:
    """Return the event with which a run starts."""
    return next(event for event in events if isinstance(event, Started))


@pytest.mark.parametrize("kind", KINDS)
def test_timing_steps_leaves_no_trace(tiny: Tiny, kind: str) -> None:
    sets = ("train.max_steps=4", *KINDS[kind])
    finish(plain := tiny(*sets, name="plain"))
    with session_of(tiny(*sets)) as session:
        stepper = Stepper(session)
        first = {name: p.detach().clone() for name, p in session.parameters.items()}
        seconds = seconds_per_step(stepper, 0.1)
        assert seconds is not None and seconds > 0
        assert session.state.step == 0 and session.optimizer.state() == {}
        for name, parameter in session.parameters.items():
            assert torch.equal(parameter, first[name]), name
        for step in range(4):
            assert stepper.step(lambda: False) is not None
            session.state.step = step + 1
        stepper.feed.close()
        last = load_checkpoint(plain.run_folder / "last.pt")
        for name, parameter in session.parameters.items():
            assert torch.equal(parameter, last.model[name]), name
        for name, state in session.optimizer.state().items():
            assert all(torch.equal(state[key], last.optimizer[name][key]) for key in state), name


def test_timing_gives_way_to_a_stop(tiny: Tiny) -> None:
    with session_of(tiny()) as session:
        stepper = Stepper(session)
        assert seconds_per_step(stepper, 60.0, lambda: True) is None
        stepper.feed.close()


def test_a_step_that_takes_too_long_is_timed_by_its_micro_batches(tiny: Tiny) -> None:
    config = tiny("train.micro_batch_size=1", "train.tokens_per_step=64000")  # 4,000 micro-batches
    with session_of(config) as session:
        stepper = Stepper(session)
        began = time.perf_counter()
        seconds = seconds_per_step(stepper, 0.02)
        took = time.perf_counter() - began
        stepper.feed.close()
    assert seconds is not None and seconds > 2 * took


def test_the_steps_that_fit_leave_time_for_the_rest(tiny: Tiny) -> None:
    spec = settle(tiny("train.max_steps=null", "train.max_minutes=1", "generate.max_new_tokens=1"))
    often = settle(tiny("train.max_steps=null", "train.max_minutes=1", "train.eval_every=1"))
    assert spec.budget == 1 and spec.max_steps > 10**7
    many = steps_within(spec, 60.0, 0.01)
    assert 0 < steps_within(often, 60.0, 0.01) < many <= 6000
    assert steps_within(spec, 120.0, 0.01) == pytest.approx(2 * many, rel=0.01)
    assert steps_within(spec, 0.0, 0.01) == steps_within(spec, -1.0, 0.01) == 1
    few = settle(tiny("train.max_steps=7", "train.max_minutes=1"))
    assert steps_within(few, 60.0, 0.01) == 7


def test_a_budget_settles_the_steps_once_and_stores_them(tiny: Tiny) -> None:
    config = tiny(*BUDGET, "train.eval_every=1000")
    events = finish(config)
    n_steps = started(events).spec.max_steps
    assert isinstance(events[-1], Finished) and events[-1].step == n_steps
    assert f"{n_steps:,} steps fit in train.max_minutes = 0.03 here" in started(events).notes
    stored = read_yaml(config.run_folder / "config.yaml").values["train"]
    assert stored["max_steps"] == n_steps and stored["max_minutes"] == 0.03
    assert events[-1].spent["measuring"] > 0
    again = finish(config, resume=True)
    assert [type(event) for event in again] == [Finished] and again[0].step == n_steps


def test_a_run_with_a_budget_is_the_run_of_its_steps_and_resumes_exactly(tiny: Tiny) -> None:
    whole = tiny(*BUDGET, "model.dropout=0.1", name="whole")
    n_steps = started(finish(whole)).spec.max_steps
    known = tiny(f"train.max_steps={n_steps}", "model.dropout=0.1", name="known")
    finish(known)
    one, other = result_of(whole), result_of(known)
    assert one.bits == other.bits and one.metrics == other.metrics
    cut = tiny(f"train.max_steps={n_steps}", "train.max_minutes=9", "model.dropout=0.1", name="cut")
    stop_after(cut, max(1, n_steps // 2))
    assert started(finish(cut, resume=True)).spec.max_steps == n_steps
    assert result_of(cut).bits == one.bits


def test_a_resumed_run_keeps_its_steps(tiny: Tiny) -> None:
    config = tiny(*BUDGET)
    n_steps = started(stop_after(config, 2)).spec.max_steps
    events = finish(config, resume=True)
    assert started(events).spec.max_steps == n_steps == events[-1].step
    assert not [note for note in started(events).notes if "max_steps" in note]


def test_a_resumed_run_with_other_minutes_goes_on_at_its_own_speed(tiny: Tiny) -> None:
    n_steps = finish(tiny(*BUDGET))[-1].step
    seconds = load_checkpoint(Path("runs/tiny/last.pt")).state["seconds"]
    events = stop_after(tiny(BUDGET[0], "train.max_minutes=5"), n_steps + 1, resume=True)
    assert started(events).spec.max_steps == int(n_steps * 300 / seconds) > n_steps
    shorter = tiny(BUDGET[0], "train.max_minutes=0.001")
    assert finish(shorter, resume=True)[-1].step == n_steps + 1


def test_the_first_limit_ends_the_run(tiny: Tiny) -> None:
    assert finish(tiny("train.max_steps=5", "train.max_minutes=1"))[-1].step == 5
    epoch = tiny("train.max_steps=null", "train.max_epochs=0.1", "train.max_minutes=1", name="b")
    assert finish(epoch)[-1].step == settle(epoch).max_steps < 100


def test_a_stop_while_steps_are_timed_leaves_them_to_be_timed_again(tiny: Tiny) -> None:
    config, stop = tiny("train.max_steps=null", "train.max_minutes=10"), StopRequest()
    stop.request()
    assert list(train(config, stop=stop))[-1].step == 0
    events = finish(tiny(*BUDGET), resume=True)
    assert events[-1].step == started(events).spec.max_steps < 10**6


def test_a_dry_run_says_how_many_steps_fit(tiny: Tiny) -> None:
    shown: list[int] = []
    config = tiny("train.max_steps=null", "train.max_minutes=1")
    plan, timed = plan_with_steps(config, on_plan=lambda plan: shown.append(plan.spec.max_steps))
    assert timed is not None and shown == [timed.max_steps] == [plan.spec.max_steps]
    assert plan.json(timed)["max_minutes"] == 1
    work = plan.seconds_left(timed)
    assert sum(work.values()) - work["setting up"] == pytest.approx(60, rel=0.05)
    unmeasured = dict(Plan.of(settle(config)).lines())
    assert unmeasured["steps"] == "as many as fit in 1 minute of 64 tokens (rows: 4 x 1)"
    assert not config.run_folder.exists()


def test_minutes_is_the_option_of_the_key(gpt: Any, data: Path, tiny_set: list[str]) -> None:
    words = ["train", *tiny_set, "-s", "train.max_steps=null", "--minutes", "0.02"]
    done = gpt(*words, "--json")
    assert done.code == 0, done.err
    assert "steps fit in train.max_minutes = 0.02 here" in done.err
    assert (
        "to train longer:" in (again := gpt(*words, "--resume").err) and "--minutes 0.04" in again
    )
    less = gpt(*words[:-1], "0.0001", "--resume").err
    assert float(less.partition("--resume --minutes ")[2].split()[0]) * 60 > done.json["seconds"]
    assert gpt("train", *tiny_set, "--minutes", "0").code == 2


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Compute with two threads, as on a machine of two cores."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_a_long_run_settles_its_threads_and_a_resumed_one_keeps_them(
    tiny: Tiny, two_threads: None
) -> None:
    config = tiny("train.max_steps=1000", "train.eval_every=5000")
    stop_after(config, 1)
    assert torch.get_num_threads() == 2, "the process is left as it was"
    settled = load_checkpoint(config.run_folder / "last.pt")
    assert settled.config["threads"] in (1, 2)
    assert settled.state["machine"]["threads"] == settled.config["threads"]
    torch.set_num_threads(4)
    notes = started(stop_after(config, 2, resume=True)).notes
    assert not [note for note in notes if "threads" in note]
    again = load_checkpoint(config.run_folder / "last.pt")
    assert again.config["threads"] == settled.config["threads"]


def test_threads_that_are_set_hold(tiny: Tiny, two_threads: None) -> None:
    config = tiny("train.max_steps=1000", "train.eval_every=5000", "threads=1")
    stop_after(config, 1)
    assert load_checkpoint(config.run_folder / "last.pt").config["threads"] == 1
    notes = started(stop_after(tiny("train.max_steps=1000", "threads=2"), 2, resume=True)).notes
    assert "threads changed from 1 to 2" in notes
    assert any(
        "no longer bit-exact" in note and "threads (1 then, 2 now)" in note for note in notes
    )


def test_a_run_of_before_is_resumed_with_the_threads_of_its_machine(
    tiny: Tiny, two_threads: None
) -> None:
    config = tiny("train.max_steps=9")
    stop_after(config, 1)
    checkpoint = load_checkpoint(config.run_folder / "last.pt")
    del checkpoint.config["threads"]
    checkpoint.state["machine"]["threads"] = 3
    assert settle(config, 1, checkpoint).config.threads == 3
    assert settle(config, 2, checkpoint).config.threads == 2
