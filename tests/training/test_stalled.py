"""`train.stop_after`: a run ends when evaluations no longer improve, as a regular end."""

import json
from pathlib import Path
from typing import Any

import pytest

from gptcli.config import Config
from gptcli.errors import ConfigError
from gptcli.training.events import Evaluated, Finished
from gptcli.training.loop import train
from gptcli.training.signals import StopRequest
from gptcli.training.spec import settle
from support.runs import Tiny, finish, metrics, result_of, stop_after

# It gets worse once the rate is far too high.
WORSE = (
    "train.max_steps=200", "train.eval_every=2", "train.save_every=3", "train.stop_after=3",
    "optim.lr=0.5", "optim.grad_clip=0", "train.log_every=1",
)  # fmt: skip
WHY = "no better validation loss in 3 evaluations"


def ended(config: Config) -> dict[str, Any]:
    """Return status.json."""
    found: dict[str, Any] = json.loads((config.run_folder / "status.json").read_text())
    return found


def test_a_run_ends_after_so_many_evaluations_without_a_better_one(tiny: Tiny) -> None:
    config = tiny(*WORSE)
    events = finish(config)
    last = events[-1]
    assert isinstance(last, Finished) and last.reason == WHY and last.best_step is not None
    assert last.step == last.best_step + 3 * 2 < 200
    scores = [event.is_best for event in events if isinstance(event, Evaluated)]
    assert scores[-4:] == [True, False, False, False]
    status = ended(config)
    assert (status["state"], status["exit_code"], status["reason"]) == ("finished", 0, WHY)
    assert (config.run_folder / "last.pt").exists() and (config.run_folder / "best.pt").exists()
    assert f"finished at step {last.step}: {WHY}" in (config.run_folder / "log.txt").read_text()
    assert (config.run_folder / "samples.jsonl").read_text().count("\n") == 1


def test_resuming_it_changes_nothing_unless_more_patience_is_given(tiny: Tiny) -> None:
    config = tiny(*WORSE)
    last = finish(config)[-1]
    again = finish(config, resume=True)
    assert [type(event) for event in again] == [Finished] and again[0].reason == WHY
    further = finish(tiny(*WORSE, "train.stop_after=4"), resume=True)
    assert further[-1].step > last.step


@pytest.mark.parametrize("back", [0, 1, 2, 5])
def test_a_resumed_run_ends_where_the_other_one_does(tiny: Tiny, back: int) -> None:
    whole = tiny(*WORSE, name="whole")
    last = finish(whole)[-1]
    cut = tiny(*WORSE, name="cut")
    stop_after(cut, last.step - back)
    finish(cut, resume=True)
    assert ended(cut)["step"] == last.step
    assert metrics(cut) == metrics(whole) and result_of(cut).bits == result_of(whole).bits


def test_a_crash_before_the_last_evaluation_costs_only_that(tiny: Tiny) -> None:
    whole = tiny(*WORSE, name="whole")
    last = finish(whole)[-1]
    cut = tiny(*WORSE, name="cut")
    stop = StopRequest()
    for event in train(cut, stop=stop):  # stopped while the last evaluation would begin
        if getattr(event, "work", "") == "evaluating" and event.step == last.step:
            stop.request()
    assert ended(cut)["state"] == "stopped"
    events = finish(cut, resume=True)
    assert events[-1].reason == WHY and events[-1].step == last.step
    assert metrics(cut) == metrics(whole)


def test_without_validation_it_is_refused(tiny: Tiny, corpus: Path, gpt: Any) -> None:
    done = gpt("prepare", str(corpus), "--out", "data/all", "-s", "tokenizer.name=bytes",
               "-s", "data.val_fraction=0")  # fmt: skip
    assert done.code == 0
    with pytest.raises(ConfigError, match="no validation text"):
        settle(tiny("data.dir=data/all", "train.stop_after=2"))


def test_the_command_ends_well_and_says_why(gpt: Any, data: Path, tiny_set: list[str]) -> None:
    words = ["train", *tiny_set, *(word for one in WORSE for word in ("-s", one))]
    done = gpt(*words)
    assert done.code == 0 and f"stopped early: {WHY}" in done.out
    assert "-s train.stop_after=null" in done.err
