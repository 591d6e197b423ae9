"""The run folder: what befalls it while it is trained in, and records of it that are damaged."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gptcli.checkpoint import load_checkpoint
from gptcli.config import Config
from gptcli.errors import StorageError
from gptcli.runs import read_run
from gptcli.training.events import Event, Finished, Started, StepDone
from gptcli.training.loop import train
from support.runs import Tiny

FOLDER = Path("runs/tiny")


def spoilt_at(config: Config, step: int, spoil: Callable[[], object]) -> StorageError:
    """Train, do something to the folder once `step` steps are done; return the run's error."""
    with pytest.raises(StorageError) as caught:
        for event in train(config):
            if isinstance(event, StepDone) and event.step == step:
                spoil()
    return caught.value


def replace_by_a_folder(path: Path) -> None:
    """Put a folder in the place of a file."""
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("away", [shutil.rmtree, lambda path: path.rename("elsewhere")])
@pytest.mark.parametrize("folder", ["runs/tiny", "runs"])
def test_a_run_folder_that_is_gone_ends_the_run_by_its_name(
    tiny: Tiny, away: Callable[[Path], object], folder: str
) -> None:
    error = spoilt_at(tiny(), 2, lambda: away(Path(folder)))
    assert error.exit_code == 5 and error.message.startswith(f"{folder}: no such folder")
    assert not Path(folder).exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "log.txt"])
def test_a_record_that_became_a_folder_ends_the_run_and_its_state_is_saved(
    tiny: Tiny, name: str
) -> None:
    error = spoilt_at(tiny("train.max_steps=4"), 1, lambda: replace_by_a_folder(FOLDER / name))
    assert f"{FOLDER / name}: is a folder, not a file; step 2 is saved" in error.message
    assert load_checkpoint(FOLDER / "last.pt").state["step"] == 2
    with pytest.raises(StorageError, match="is a folder, not a file"):
        list(train(tiny("train.max_steps=4"), resume=True))
    (FOLDER / name).rmdir()
    assert isinstance(list(train(tiny("train.max_steps=4"), resume=True))[-1], Finished)


def test_a_best_checkpoint_that_became_a_folder_ends_the_run_and_its_state_is_saved(
    tiny: Tiny,
) -> None:
    error = spoilt_at(tiny(), 4, lambda: replace_by_a_folder(FOLDER / "best.pt"))
    assert "best.pt: is a folder, not a file; step 6 is saved in" in error.message
    assert error.hint is not None and error.hint.endswith("the same command with --resume")


def test_nothing_is_written_into_a_folder_that_took_the_place_of_the_runs(tiny: Tiny) -> None:
    def swap() -> None:
        FOLDER.rename("elsewhere")
        FOLDER.mkdir()

    error = spoilt_at(tiny(), 2, swap)
    assert error.message == "runs/tiny: another folder has replaced the run's"
    assert list(FOLDER.iterdir()) == []
    FOLDER.rmdir()
    Path("elsewhere").rename(FOLDER)
    assert isinstance(list(train(tiny(), resume=True))[-1], Finished)


def test_checkpoints_that_are_gone_end_the_run_and_its_state_is_saved(tiny: Tiny) -> None:
    error = spoilt_at(tiny(), 2, lambda: shutil.rmtree(FOLDER / "checkpoints"))
    assert "runs/tiny/checkpoints: no such folder" in error.message
    assert "step 3 is saved in runs/tiny/checkpoints/step-00000003.pt" in error.message
    assert isinstance(list(train(tiny(), resume=True))[-1], Finished)


def started(events: list[Event]) -> Started:
    """Return the first event."""
    assert isinstance(events[0], Started)
    return events[0]


DEEP = "[" * 100_000
BAD_SUMMARIES = ['"done"', "[1]", '{"step": 6}', '{"run_dir": 1, "step": "six", "tokens": []}']


@pytest.mark.parametrize(
    "status", ["", "7", '"finished"', DEEP, '{"summary": ' + DEEP,
               *(f'{{"state": "finished", "summary": {one}}}' for one in BAD_SUMMARIES)]
)  # fmt: skip
def test_a_status_of_another_shape_hinders_no_resuming(tiny: Tiny, status: str) -> None:
    config = tiny("train.max_steps=3")
    list(train(config))
    (FOLDER / "status.json").write_text(status)
    before = (FOLDER / "metrics.jsonl").read_text()
    events = list(train(config, resume=True))
    assert started(events).notes == ("runs/tiny/status.json does not say how the run ended",)
    assert isinstance(events[-1], Finished) and events[-1].step == 3
    assert (FOLDER / "metrics.jsonl").read_text() == before
    assert list(train(config, resume=True))[-1] == events[-1].__class__(
        3, events[-1].summary, {}, events[-1].best_step
    )


@pytest.mark.parametrize("bad", ['{"step": "two"}', '{"step": null, "loss": 1}', "{", DEEP, "\0"])
def test_lines_that_cannot_be_read_are_left_out_and_named(tiny: Tiny, bad: str) -> None:
    list(train(tiny("train.max_steps=3")))
    path = FOLDER / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], bad, *lines[1:]]) + "\n")
    (note, *_) = started(list(train(tiny("train.max_steps=5"), resume=True))).notes[-1:]
    assert note == f"{path}: skipped line 2 that cannot be read"
    history = read_run(FOLDER)
    assert history.problems == () and [row.step for row in history.steps] == [1, 2, 3, 4, 5]


def test_where_the_time_went_is_kept_over_a_stop_and_adds_up(tiny: Tiny) -> None:
    events = list(train(tiny("train.max_steps=3")))
    longer = list(train(tiny("train.max_steps=6"), resume=True))
    (one, two) = (event[-1] for event in (events, longer))
    assert isinstance(one, Finished) and isinstance(two, Finished)
    assert sum(one.spent.values()) == one.summary.seconds > one.spent["evaluating"] > 0
    assert sum(two.spent.values()) == two.summary.seconds > one.summary.seconds
    assert two.spent["evaluating"] > one.spent["evaluating"]
    status = json.loads((FOLDER / "status.json").read_text())
    history = read_run(FOLDER)
    assert status["seconds_by_work"] == two.spent == history.status.seconds_by_work
    assert history.seconds == two.summary.seconds > history.steps[-1].seconds
