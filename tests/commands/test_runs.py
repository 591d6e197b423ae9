"""`gpt runs`: the runs there are, one in full, several side by side."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def second(run: Path, tiny_set: list[str], gpt: Any) -> Path:
    """Another finished run, shorter, of another learning rate."""
    done = gpt("train", *tiny_set, "-s", "name=second", "-s", "optim.lr=1e-2",
               "-s", "train.max_steps=3")  # fmt: skip
    assert done.code == 0, done.err
    return Path("runs/second")


def make_failed(folder: Path) -> None:
    """Make a run look like one that failed."""
    status = json.loads((folder / "status.json").read_text())
    status |= {"state": "failed", "exit_code": 7, "error": "the loss is not finite"}
    (folder / "status.json").write_text(json.dumps(status))


def test_list_shows_the_newest_first(gpt: Any, second: Path) -> None:
    lines = gpt("runs", "list").out.splitlines()
    assert lines[0].split() == ["run", "steps", "tokens", "best", "val", "state", "age", "size"]
    assert [line.split()[:2] for line in lines[1:]] == [["second", "3/3"], ["tiny", "6/6"]]
    assert all("finished" in line for line in lines[1:])


def test_list_as_json_has_the_figures(gpt: Any, run: Path) -> None:
    [found] = gpt("runs", "list", "--json").json["runs"]
    assert (found["name"], found["step"], found["max_steps"], found["state"]) == (
        "tiny", 6, 6, "finished")  # fmt: skip
    assert found["tokens"] == 6 * 64 and 0 < found["best_val_loss"] < 10
    files = {path.stat().st_ino: path.stat().st_size for path in run.rglob("*") if path.is_file()}
    assert found["size_bytes"] == sum(files.values()), "hard links are counted once"


def test_list_where_there_are_none(gpt: Any) -> None:
    done = gpt("runs", "list")
    assert done.code == 0 and done.out == "" and "no runs in runs/" in done.err
    assert gpt("runs", "list", "elsewhere", "--json").json == {"runs": []}


def test_list_passes_over_what_is_damaged(gpt: Any, second: Path) -> None:
    (second / "metrics.jsonl").write_bytes(b"\x00{\n")
    (second / "status.json").write_text("[")
    lines = gpt("runs", "list").out.splitlines()
    assert len(lines) == 3 and "unknown" in lines[1]


def test_show_tells_a_run_and_the_commands_that_follow(gpt: Any, run: Path) -> None:
    done = gpt("runs", "show")
    assert done.out.startswith("run                   runs/tiny, finished, ")
    for part in (
        "steps                 6 of 6",
        "tokens                384",
        "best validation loss  ",
        "tokenizer bytes",
        "optim.lr",
    ):
        assert part in done.out
    settings = done.out.split("not the defaults\n")[1].split("\n\n")[0]
    assert "  optim.lr " in settings and "optim.min_lr" not in settings, "it follows from the other"
    commands = [line.removeprefix("next: gpt ") for line in done.err.splitlines()]
    assert [command.split()[0] for command in commands] == ["generate", "eval"]
    for command in commands:
        assert gpt(*shlex.split(command), "-s", "device=cpu").code == 0
    assert gpt("runs", "show", "tiny", "--json").json["next"] == [f"gpt {c}" for c in commands]
    run.rename("runs/-dash")
    for command in gpt("runs", "show", "--json").json["next"]:  # a name that is no option
        assert " runs/-dash" in command


def test_show_of_a_failed_run_says_why_and_how_to_go_on(gpt: Any, run: Path) -> None:
    make_failed(run)
    done = gpt("runs", "show", "tiny")
    assert "failed (7)" in done.out and "error                 the loss is not finite" in done.out
    [command] = [line.removeprefix("next: gpt ") for line in done.err.splitlines()]
    done = gpt(*shlex.split(command), "-s", "train.max_steps=8", "--json")
    assert done.code == 0 and done.json["step"] == 8


def test_show_of_an_unknown_run_names_the_nearest(gpt: Any, run: Path) -> None:
    done = gpt("runs", "show", "tinny")
    assert done.code == 2 and "did you mean tiny?" in done.err


def test_compare_shows_what_differs_and_losses_at_equal_points(gpt: Any, second: Path) -> None:
    done = gpt("runs", "compare", "tiny", "second")
    rows = {line.split("  ")[0]: line.split() for line in done.out.splitlines()}
    assert rows["train.max_steps"][-2:] == ["6", "3"] and rows["optim.lr"][-2:] == ["0.003", "0.01"]
    assert "optim.beta1" not in rows and "name" not in rows
    assert rows["steps"][1:] == ["6", "of", "6", "3", "of", "3"]
    metrics = [
        json.loads(line) for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()
    ]
    at_3 = next(row["val_loss"] for row in metrics if row["step"] == 3 and "val_loss" in row)
    assert rows["val loss by 192 tokens"][-2] == f"{at_3:.4f}"
    found = gpt("runs", "compare", "tiny", "second", "--json").json
    assert found["settings"]["optim.lr"] == [0.003, 0.01]
    assert found["equal"] == {"tokens": 192, "val_loss": [at_3, found["runs"][1]["val_loss"]]}


def test_settings_are_shown_without_the_noise_of_arithmetic(
    gpt: Any, make_run: Callable[..., Path]
) -> None:
    for name, lr in (("one", 0.0006 / 10), ("two", 0.1)):
        (make_run(name) / "config.yaml").write_text(f"optim: {{min_lr: {lr!r}}}\n")
    assert repr(0.0006 / 10) == "5.9999999999999995e-05"
    shown = gpt("runs", "compare", "one", "two").out
    assert "6.0e-05" in shown and "5.99" not in shown


def test_compare_warns_when_losses_do_not_compare(gpt: Any, second: Path, corpus: Path) -> None:
    facts = json.loads((second / "run.json").read_text())
    facts["data"]["fingerprint"] = "another"
    (second / "run.json").write_text(json.dumps(facts))
    assert "use different data" in gpt("runs", "compare", "tiny", "second").err
    facts["data"]["tokenizer"] = "another"
    (second / "run.json").write_text(json.dumps(facts))
    assert "use different tokenizers" in gpt("runs", "compare", "tiny", "second").err


def test_compare_goes_on_without_a_run_that_was_never_evaluated(gpt: Any, second: Path) -> None:
    third = Path("runs/third")
    shutil.copytree(second, third)
    (third / "metrics.jsonl").write_text("")
    found = gpt("runs", "compare", "third", "tiny", "second", "--json").json
    assert found["equal"]["tokens"] == 192 and found["equal"]["val_loss"][0] is None
    row = next(line for line in gpt("runs", "compare", "third", "tiny", "second").out.splitlines()
               if line.startswith("val loss by 192 tokens"))  # fmt: skip
    assert row.split()[-3] == "-"


def test_compare_takes_two_runs(gpt: Any, run: Path) -> None:
    assert gpt("runs", "compare", "tiny").code == 2


def test_a_folders_name_steers_no_terminal(gpt: Any, run: Path) -> None:
    shutil.copytree(run, "runs/esc\033[31mred")
    done = gpt("runs", "compare", "tiny", "esc\033[31mred")
    assert done.code == 0 and "esc[31mred" in done.out and "\033" not in done.out
