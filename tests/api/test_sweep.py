"""Sweeps: what a trial is, who trains it, and how trials are ranked."""

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptcli.api.sweep import JOURNAL, Sweep, Trial, rank
from gptcli.api.train import train
from gptcli.config import Config, load_config
from gptcli.config.space import read_space
from gptcli.errors import ConfigError, DataError
from gptcli.training.events import Event, StepDone, Summary
from support.runs import Tiny

SHORT = ("model.n_layer=1", "train.max_steps=2", "train.eval_every=2", "generate.max_new_tokens=1")


def begin(base: Config, words: list[str], **how: Any) -> Sweep:
    """Begin or continue a sweep."""
    return Sweep(base, read_space(words, base), **how)


def trained(sweep: Sweep) -> list[Trial]:
    """Train all that is left, and return the ranked trials."""
    while (unit := sweep.next()) is not None:
        sweep.train(*unit)
    return sweep.results()


def pretend(sweep: Sweep, loss: Callable[[dict[str, Any], int], float]) -> list[Trial]:
    """End all runs that are left with a loss, without training them."""
    while (unit := sweep.next()) is not None:
        one, seed = unit
        folder = sweep.run_folder(one.number, seed)
        folder.mkdir()
        end = dataclasses.asdict(
            Summary("", 2, 128, 1.0, loss(one.settings, seed), None, None, 1.0, None)
        )
        status = {"state": "finished", "exit_code": 0, "step": 2, "summary": end}
        (folder / "status.json").write_text(json.dumps(status))
    return sweep.results()


def test_each_setting_is_trained_as_any_run_with_the_same_seeds(tiny: Tiny) -> None:
    base = tiny(*SHORT)
    ranked = trained(begin(base, ["optim.lr=1e-3,1e-2", "model.n_head=2,3"], seeds=2))
    assert [one.verdict for one in ranked[2:]] == ["failed", "failed"]
    assert all("not divisible by n_head = 3" in (one.error or "") for one in ranked[2:])
    best = ranked[0]
    assert best.verdict == "best" and best.settings == {"optim.lr": 1e-2, "model.n_head": 2}
    alone = load_config(None, ["seed=1338", "optim.lr=1e-2", "name=alone"],
                        base=base.model_dump(exclude_unset=True))  # fmt: skip
    assert train(alone).finish().val_loss == best.losses[1338]
    assert best.mean == pytest.approx(sum(v or 0 for v in best.losses.values()) / 2)
    assert len(list(Path("runs/tiny-sweep").glob("*/best.pt"))) == 4
    winner = load_config("runs/tiny-sweep/best.yaml")
    assert winner.optim.lr == 1e-2 and winner.run_folder == Path("runs/tiny-sweep-best")
    assert winner.train == base.train and winner.seed == base.seed
    assert Path("runs/tiny-sweep/sweep.svg").read_text(encoding="utf-8").count("<svg") == 1


def test_a_loss_that_is_not_finite_is_a_result(tiny: Tiny) -> None:
    base = tiny(*SHORT, "train.max_steps=4", "optim.grad_clip=0")
    sweep = begin(base, ["optim.lr=1e-3,1e12"], seeds=1)
    ranked = trained(sweep)
    assert [one.verdict for one in ranked] == ["best", "not finite"]
    assert ranked[1].settings == {"optim.lr": 1e12} and ranked[1].losses == {1337: math.inf}
    assert trained(begin(base, ["optim.lr=1e-3,1e12"], seeds=1)) == ranked  # nothing is repeated


def test_two_processes_share_the_runs(tiny: Tiny) -> None:
    space = ["optim.lr=1e-3,1e-2"]
    one, other = (begin(tiny(*SHORT), space, seeds=2) for _ in range(2))
    said: list[str] = []

    def meanwhile(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 1:
            while (unit := other.next()) is not None:
                said.append(other.train(*unit).partition(" ")[0])

    unit = one.next()
    assert unit is not None
    one.train(*unit, meanwhile)
    assert said == ["another", "val", "val", "val"]
    assert [trial.verdict for trial in other.results()] == [trial.verdict for trial in trained(one)]
    assert one.next() is None


def test_a_run_that_was_stopped_is_continued(tiny: Tiny) -> None:
    base, space = tiny(*SHORT, "train.max_steps=4"), ["optim.lr=1e-3,1e-2"]

    class Gone(Exception):
        pass

    def crash(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 3:
            raise Gone

    first = begin(base, space, seeds=1)
    unit = first.next()
    assert unit is not None
    with pytest.raises(Gone):
        first.train(*unit, crash)
    interrupted = trained(begin(base, space, seeds=1))
    moved = begin(tiny(*SHORT, "train.max_steps=4", name="other"), space, seeds=1)
    assert trained(moved) == interrupted


def test_another_sweep_in_the_folder_is_refused_and_more_trials_are_not(tiny: Tiny) -> None:
    space = ["optim.lr=1e-3..1e-2:log"]
    first = pretend(begin(tiny(), space, trials=3), lambda point, seed: 1.0)
    again = pretend(begin(tiny(), space, trials=5), lambda point, seed: 2.0)
    assert len(first) == 3 and again[:3] == first and len(again) == 5
    for base, words, seeds, key in (
        (tiny("optim.beta2=0.99"), space, 3, "optim.beta2 (0.95 there, 0.99 here)"),
        (
            tiny(),
            ["optim.lr=1e-3..2e-2:log"],
            3,
            "optim.lr= (0.001..0.01:log there, 0.001..0.02",
        ),
        (tiny(), space, 2, "--seeds (3 there, 2 here)"),
    ):
        with pytest.raises(ConfigError) as refused:
            begin(base, words, seeds=seeds)
        assert key in refused.value.message


def test_a_line_that_a_crash_cut_short_is_dropped(tiny: Tiny) -> None:
    space = ["optim.lr=1e-3,1e-2,2e-2"]
    sweep = begin(tiny(), space, seeds=1)
    assert sweep.next() is not None
    with (sweep.folder / JOURNAL).open("ab") as file:
        file.write(b'{"op_code": 4, "worker')
    assert len(pretend(begin(tiny(), space, seeds=1), lambda point, seed: 1.0)) == 3
    assert len(pretend(begin(tiny(), space, seeds=1), lambda point, seed: 1.0)) == 3


@pytest.mark.parametrize("line", [b"cat\n", b"\xff\n", b"[]\n", b"{}\n", b'{"op_code": 99}\n'])
def test_a_damaged_journal_is_refused_and_made_again_from_the_runs(tiny: Tiny, line: bytes) -> None:
    space = ["optim.lr=1e-3,1e-2"]
    sweep = begin(tiny(), space, seeds=1)
    ranked, journal = pretend(sweep, lambda point, seed: 1.0), sweep.folder / JOURNAL
    journal.write_bytes(journal.read_bytes() + line)
    with pytest.raises(DataError, match=r"journal\.log: damaged") as refused:
        begin(tiny(), space, seeds=1)
    assert "move it away" in str(refused.value.hint)
    journal.rename("elsewhere")
    assert trained(begin(tiny(), space, seeds=1)) == ranked


def test_a_run_that_can_no_longer_be_trained_is_tried_once(tiny: Tiny) -> None:
    space = ["optim.lr=1e-3,1e-2"]
    sweep = begin(tiny(), space, seeds=1)
    pretend(sweep, lambda point, seed: 1.0)
    folder = sweep.run_folder(0, tiny().seed)
    shutil.rmtree(folder)
    folder.write_text("a file")
    again = begin(tiny(), space, seeds=1)
    assert (unit := again.next()) is not None and "is a file" in again.train(*unit)
    assert again.next() is None
    assert [one.verdict for one in again.results()] == ["best", "unfinished"]


def test_a_sweep_without_validation_text_is_refused(tiny: Tiny, corpus: Path) -> None:
    config = tiny(f"data.source={corpus}", "data.dir=data/all", "data.val_fraction=0",
                  "tokenizer.name=bytes")  # fmt: skip
    with pytest.raises(DataError, match="no validation text"):
        begin(config, ["optim.lr=1e-3,1e-2"])
    assert not Path("runs").exists()


def test_runs_that_may_end_before_their_schedule_are_refused(tiny: Tiny) -> None:
    with pytest.raises(ConfigError, match=r"train\.stop_after"):
        begin(tiny("train.stop_after=2"), ["optim.lr=1e-3,1e-2"])


def test_a_difference_is_told_seed_by_seed_and_only_where_there_is_one() -> None:
    def trial(number: int, *losses: float | None, error: str | None = None) -> Trial:
        return Trial(number, {}, dict(enumerate(losses)), error)

    ranked = rank(
        [
            trial(0, 1.5, None, 1.5),
            trial(1, None, None, None, error="too large"),
            trial(2, 1.02, 1.22, 1.42),  # the seeds differ by more than the trials
            trial(3, 1.0, math.inf, 1.0),
            trial(4, 1.0, 1.2, 1.4),
            trial(5, 1.5, 1.1, 1.1),
        ]
    )
    assert [(one.number, one.verdict) for one in ranked] == [
        (4, "best"), (2, "worse"), (5, "not distinguishable"), (3, "not finite"), (1, "failed"),
        (0, "unfinished"),
    ]  # fmt: skip
    assert ranked[0].margin == pytest.approx(4.303 * 0.2 / 3**0.5, rel=1e-3)
    assert ranked[1].above == pytest.approx(0.02) and ranked[1].above_margin is not None
    assert [one.verdict for one in rank([trial(0, 1.1), trial(1, 1.0)])] == ["best", ""]
    assert rank([]) == []


def test_without_optuna_a_sweep_says_what_to_install(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "optuna" else find(name)
    )
    with pytest.raises(ConfigError) as refused:
        begin(tiny(), ["optim.lr=1e-3,1e-2"])
    assert "pip install 'gptcli[sweep]'" in (refused.value.hint or "")
