"""Reading run folders: what is found, and what damage leaves."""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from gptcli.commands import complete
from gptcli.config.render import explicit_settings
from gptcli.errors import ConfigError
from gptcli.runs import read_run
from gptcli.runs.find import find_checkpoint, find_run, list_runs
from gptcli.runs.folder import Run
from support.runs import Logged, MakeRun


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
    assert [*found.checkpoints][:2] == ["best.pt", "last.pt"]
    assert all(n_bytes > 1000 for n_bytes in found.checkpoints.values())
    assert found.status.seconds_by_work["steps"] > 0
    assert [sample.step for sample in found.samples] == [6] and found.samples[0].text


def test_the_tokens_of_steps_that_were_not_logged_yet_count(gpt: Any, tiny_set: list[str]) -> None:
    sets = ("train.log_every=100", "train.max_steps=2")
    assert gpt("train", *tiny_set, *(w for key in sets for w in ("-s", key))).code == 0
    metrics = Path("runs/tiny/metrics.jsonl")
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(line for line in lines if "tokens_per_second" not in line))
    [listed] = gpt("runs", "list", "--json").json["runs"]
    assert (listed["step"], listed["tokens"]) == (2, 2 * 64)


def test_only_what_somebody_set_counts_as_changed(run: Path, gpt: Any) -> None:
    found = read_run(run)
    changed = explicit_settings(found.settings, found.facts.given)
    assert changed["model.n_layer"] == 2 and changed["train.max_steps"] == 6
    assert changed["device"] == "cpu"  # which was set
    for key in ("model.bias", "model.vocab_size", "deterministic", "optim.min_lr", "run_dir"):
        assert key in found.settings and key not in changed
    assert "model.vocab_size" not in gpt("runs", "show", "tiny").out
    assert "device" not in explicit_settings(
        found.settings, None
    )  # nobody noted it: the machine chose
    from gptcli.plotting.report import render

    listed = render(found, "now").partition("What differs from the defaults")[2]
    assert "model.vocab_size" not in listed.partition("<details>")[0]


def test_the_newest_run_is_the_same_for_every_command(make_run: MakeRun) -> None:
    for name, age in (("old", 100), ("new", 0)):
        (make_run(name, age=age) / "best.pt").write_bytes(b"")
    (Path("runs/old/last.pt")).write_bytes(b"")  # a copy, as by cp -r: newer than any record
    newest = find_run(None)
    assert newest == Path("runs/new") == find_checkpoint(None).parent
    assert complete.runs("")[0][0] == "new"


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
    assert any("skipped line 2" in problem for problem in found.problems)


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


HOSTILE = {
    "run.json": ['{"parameters": 1e999}', '{"parameters": ' + "9" * 4000 + "}", "[" * 200_000,
                 '{"data": {"tokens": {"train": -1}}}', "\x00", '{"given": 3}'],
    "status.json": ['{"state": ["a"]}', '"running"', '{"step": "soon"}', '{"a":' * 100_000,
                    '{"seconds_by_work": {"steps": 1e300}}', '{"seconds_by_work": {"steps": -1}}',
                    '{"step": ' + "9" * 400 + "}", '{"seconds": 1e300}', '{"pid": -1}'],
    "metrics.jsonl": ['{"step": "one", "loss": 2}\n', '{"step": 1, "loss": [[]]}\n',
                      "[" * 200_000 + "\n", "\n" * 50_000,
                      '{"step": 1e400, "tokens": 1, "loss": 1, "lr": 1, "seconds": 1}\n'],
    "samples.jsonl": ['{"step": {}, "prompt": 1, "text": null}\n'],
    "config.yaml": ["seed: " + "9" * 4000, "seed: " + "9" * 5000,
                    "data: {seq_len: 0, stride: -1}", "a: [" * 20_000, "- 1", "model: [1]"],
    "log.txt": ["\xff" * 10_000],
}  # fmt: skip


@pytest.mark.parametrize(
    ("file", "content"), [(file, one) for file, many in HOSTILE.items() for one in many]
)
def test_hostile_records_neither_hang_nor_fail_a_command(
    make_run: MakeRun, logged: Logged, gpt: Any, file: str, content: str
) -> None:
    make_run("good", [logged(1), {"step": 1, "val_loss": 2.0, "train_loss": 2.0}])
    folder = make_run("bad", [logged(1)])
    (folder / "status.json").write_text('{"state": "finished", "step": 1}')
    (folder / file).write_text(content)
    began = time.process_time()
    for words in (["list"], ["show", "bad"], ["compare", "good", "bad"]):
        for json_ in ([], ["--json"]):
            done = gpt("runs", *words, *json_)
            assert done.code == 0 and "Traceback" not in done.err, done.err
    done = gpt("report", "bad")
    assert done.code == 0, done.err
    assert time.process_time() - began < 20


def test_records_that_are_no_files_are_problems(
    make_run: MakeRun, logged: Logged, gpt: Any
) -> None:
    for name in ("run.json", "status.json", "metrics.jsonl", "config.yaml", "log.txt"):
        folder = make_run(f"bad-{name}", [logged(1)])
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()
        pipe = make_run(f"pipe-{name}", [logged(1)])
        (pipe / name).unlink(missing_ok=True)
        os.mkfifo(pipe / name)
    listed = gpt("runs", "list", "--json")
    assert listed.code == 0 and len(listed.json["runs"]) >= 8, listed.err
    told = "\n".join(read_run(Path("runs/bad-metrics.jsonl")).problems)
    assert "metrics.jsonl: cannot be read" in told


def test_a_run_that_failed_keeps_its_times(make_run: MakeRun) -> None:
    run = Run(make_run("failed"))
    run.write_status("running", 3, None, seconds_by_work={"steps": 2.0})
    run.write_failure(7, "loss is not finite")
    status = read_run(run.folder).status
    assert (status.state, status.step, status.exit_code) == ("failed", 3, 7)
    assert status.seconds_by_work == {"steps": 2.0}
