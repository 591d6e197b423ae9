"""Reading run folders: what is found, and what damage leaves."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptcli import history
from gptcli.errors import ConfigError
from gptcli.history import changed_settings, find_run, list_runs, read_run
from gptcli.training import run as training_run

MakeRun = Callable[..., Path]
Logged = Callable[..., dict[str, Any]]


def test_the_files_are_those_that_training_writes() -> None:
    for name in ("RUN", "STATUS", "METRICS", "SAMPLES", "CONFIG", "LOG"):
        assert getattr(history, name) == getattr(training_run, name)


def test_a_trained_run_is_read_whole(run: Path) -> None:
    found = read_run(run)
    assert found.problems == () and found.name == "tiny" and found.state == "finished"
    assert [row.step for row in found.steps] == [1, 2, 3, 4, 5, 6]
    assert [row.step for row in found.evaluations] == [3, 6]
    assert found.step == found.max_steps == 6 and found.steps[-1].tokens == 6 * 64
    assert found.best is not None
    assert found.best.val_loss == min(row.val_loss or 99 for row in found.evaluations)
    assert found.facts.parameters and str(found.facts.data.source).endswith("corpus.txt")
    assert found.facts.data.tokens.train > found.facts.data.tokens.val > 0
    assert [file.name for file in found.checkpoints][:2] == ["best.pt", "last.pt"]
    assert all(file.n_bytes > 1000 for file in found.checkpoints)
    assert found.seconds_by_work["steps"] > 0
    assert [sample.step for sample in found.samples] == [6] and found.samples[0].text


def test_only_what_differs_from_the_defaults_counts_as_changed(run: Path) -> None:
    changed = changed_settings(read_run(run).settings)
    assert changed["model.n_layer"] == 2 and changed["train.max_steps"] == 6
    assert "model.bias" not in changed and "optim.weight_decay" not in changed


def test_a_run_is_found_by_folder_and_by_name_and_the_newest_without(make_run: MakeRun) -> None:
    old, new = make_run("old", age=100), make_run("new")
    assert find_run("old") == old == find_run("runs/old") and find_run(None) == new
    assert list_runs() == [new, old]
    os.utime(old / "metrics.jsonl", (2e9, 2e9))  # it is being trained
    assert find_run(None) == old


def test_a_run_that_is_not_there_is_answered_with_those_that_are(make_run: MakeRun) -> None:
    with pytest.raises(ConfigError, match="no run in runs/"):
        find_run(None)
    make_run("gpt-small")
    make_run("other")
    with pytest.raises(ConfigError, match="no such run") as error:
        find_run("gpt-smal")
    assert error.value.hint == "did you mean gpt-small?"
    with pytest.raises(ConfigError, match="no such run") as error:
        find_run("\0")
    assert error.value.hint is not None and "gpt-small" in error.value.hint
    Path("data").mkdir()
    with pytest.raises(ConfigError, match=r"holds no run \(run.json is missing\)"):
        find_run("data")


def test_a_line_that_is_being_written_is_left_out_without_a_word(
    make_run: MakeRun, logged: Logged
) -> None:
    folder = make_run("torn", [logged(1), logged(2)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "tok')
    found = read_run(folder)
    assert [row.step for row in found.steps] == [1, 2]
    assert not any("metrics" in problem for problem in found.problems)


@pytest.mark.parametrize(
    "damage",
    [b"\xff\x00\n", b"[1, 2]\n", b"7\n", b'{"loss": "x", "step": 1}\n', b"\n",
     b'{"step": 2, "tokens": 1, "loss": 1e999, "lr": 0, "seconds": 0}\n', b"[" * 100_000 + b"\n",
     b'{"step": 2, "tokens": 1' + b"0" * 400 + b', "loss": 1, "lr": 0, "seconds": 0}\n',
     b'{"step": 2, "tokens": 1, "loss": 1e300, "lr": 0, "seconds": 0}\n'],
    ids=["bytes", "list", "number", "text", "empty", "infinite", "deep", "huge", "vast"],
)  # fmt: skip
def test_a_damaged_line_is_told_and_left_out(
    damage: bytes, make_run: MakeRun, logged: Logged
) -> None:
    folder = make_run("damaged", [logged(1)])
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + damage + (json.dumps(logged(3)) + "\n").encode())
    found = read_run(folder)
    assert [row.step for row in found.steps] == [1, 3]
    assert any("line 2 cannot be read" in problem for problem in found.problems)


def test_missing_and_damaged_files_leave_problems_and_no_error(make_run: MakeRun) -> None:
    folder = make_run("bare")
    (folder / "metrics.jsonl").unlink()
    (folder / "run.json").write_text("[")
    (folder / "config.yaml").write_text("a: [")
    found = read_run(folder)
    assert found.steps == () and found.best is None and found.step == 0
    assert found.seconds_at(5) == 0.0 and found.state == "unknown"
    told = "\n".join(found.problems)
    assert "run.json: cannot be read" in told and "status.json: is missing" in told
    assert "config.yaml" in told


def test_a_step_without_a_finite_loss_is_kept(make_run: MakeRun, logged: Logged) -> None:
    found = read_run(make_run("nan", [logged(1, loss=None, grad_norm=None, skipped=True)]))
    assert found.steps[0].loss is None and found.steps[0].skipped


def test_tokens_and_seconds_lie_between_logged_steps_in_proportion(
    make_run: MakeRun, logged: Logged
) -> None:
    found = read_run(make_run("between", [logged(10), logged(20)]))
    assert found.tokens_at(15) == 15 * 64 and found.seconds_at(15) == 30.0
    assert found.tokens_at(5) == 5 * 64 and found.seconds_at(99) == 40.0


def test_a_run_whose_process_is_gone_has_died(make_run: MakeRun) -> None:
    folder = make_run("died")
    status = {"state": "running", "step": 3, "host": socket.gethostname(), "pid": 2**22 + 1}
    (folder / "status.json").write_text(json.dumps(status))
    assert read_run(folder).state == ("running" if os.name == "nt" else "died")
    (folder / "status.json").write_text(json.dumps(status | {"pid": os.getpid()}))
    assert read_run(folder).state == "running"
    (folder / "status.json").write_text(json.dumps(status | {"host": "elsewhere.example"}))
    assert read_run(folder).state == "running"
