"""`gpt plot`, `gpt report` and the picture that training leaves: what they write, print, refuse."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from gptcli.plotting.curves import Axis, loss_curves
from gptcli.plotting.report import render
from gptcli.runs import read_run
from support.runs import Logged, MakeRun


def test_plot_draws_the_newest_run_into_its_folder(
    gpt: Any, make_run: MakeRun, logged: Logged
) -> None:
    make_run("old", [logged(1)], age=100)
    make_run("new", [logged(1), {"step": 1, "val_loss": 2.0, "train_loss": 3.0}])
    done = gpt("plot")
    assert done.code == 0 and done.out.strip() == str(Path("runs/new/loss.png"))
    assert Path("runs/new/loss.png").read_bytes().startswith(b"\x89PNG")


def test_plot_returns_an_object(gpt: Any, make_run: MakeRun, logged: Logged) -> None:
    lines = [logged(1), logged(2), {"step": 2, "val_loss": 2.0, "train_loss": 3.0}]
    make_run("a", lines)
    make_run("b", lines[:2])
    found = gpt("plot", "a", "runs/b", "a", "-o", "ab.svg", "--x", "tokens", "--json").json
    assert list(found) == ["file", "runs"] and found["file"] == "ab.svg"
    assert [run["name"] for run in found["runs"]] == ["a", "b"]
    expected = {
        "name": "a", "folder": str(Path("runs/a")), "state": "unknown", "step": 2, "tokens": 128,
        "loss": 4.8, "train_loss": 3.0, "val_loss": 2.0, "best_val_loss": 2.0, "best_step": 2,
    }  # fmt: skip
    assert expected.items() <= found["runs"][0].items()
    assert found["runs"][0] in gpt("runs", "list", "--json").json["runs"]
    assert found["runs"][1]["best_val_loss"] is None
    assert Path("ab.svg").read_text(encoding="utf-8").count("<svg") == 1


def test_plot_tells_what_it_cannot_read_and_draws_the_rest(
    gpt: Any, make_run: MakeRun, logged: Logged
) -> None:
    folder = make_run("a", [logged(1), logged(2)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write("damaged\n" + json.dumps(logged(3)) + '\n{"step": 4')
    done = gpt("plot", "a")
    assert done.code == 0 and "metrics.jsonl: skipped line 3" in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["plot", "a", "-o", "loss.jpg"], 2, "one of .png, .svg, .pdf"),
        (["plot", "a", "b"], 2, "name it with -o"),
        (["plot", "a", "--panels", "loss,memori"], 2, "did you mean memory?"),
        (["plot", "a", "--panels", "x"], 2, "panels: loss, lr"),
        (["plot", "a", "--x", "days"], 2, "steps"),
        (["plot", "aa"], 2, "did you mean a?"),
        (["plot", "folder"], 2, "holds no run"),
        (["plot", "empty"], 3, "nothing is logged yet"),
        (["plot", "a", "-o", "nowhere/a.png"], 5, "cannot create files there"),
        (["report", "a", "-o", "report.pdf"], 2, ".html"),
        (["report", "a", "-o", "folder"], 2, "is a folder"),
        (["report", "nowhere"], 2, "no such run"),
        (["report", "a", "-o", "nowhere/a.html"], 5, "cannot create files there"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_cannot_be_done_is_refused_with_its_reason(
    gpt: Any, make_run: MakeRun, logged: Logged, arguments: list[str], code: int, told: str
) -> None:
    make_run("a", [logged(1)])
    make_run("empty")
    Path("folder").mkdir()
    before = sorted(Path().rglob("*"))
    done = gpt(*arguments)
    assert done.code == code and told in done.err and len(done.err_lines) <= 3
    assert sorted(Path().rglob("*")) == before


def test_without_matplotlib_plot_says_what_to_install(
    gpt: Any, make_run: MakeRun, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_run("a", [logged(1)])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = gpt("plot", "a")
    assert done.code == 2 and "pip install 'gptcli[plot]'" in done.err


def test_training_leaves_a_picture_where_it_can(gpt: Any, tiny_set: list[str], run: Path) -> None:
    assert (run / "loss.pdf").read_bytes().startswith(b"%PDF")
    (run / "loss.pdf").unlink()
    assert gpt("train", *tiny_set, "--resume").code == 0  # nothing was left to do
    assert not (run / "loss.pdf").exists()


def test_training_does_without_matplotlib(
    gpt: Any, tiny_set: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = gpt("train", *tiny_set)
    assert done.code == 0 and "loss.pdf" not in done.err
    assert not Path("runs/tiny/loss.pdf").exists()


def test_a_picture_that_fails_does_not_fail_the_run(gpt: Any, tiny_set: list[str]) -> None:
    Path("runs/tiny/loss.pdf").mkdir(parents=True)
    done = gpt("train", *tiny_set, "--json")
    assert done.code == 0 and done.json["step"] == 6
    assert "note: loss.pdf could not be drawn" in done.err


def test_epoch_losses_that_choose_the_best_are_drawn_and_shown(
    gpt: Any, make_run: MakeRun, logged: Logged
) -> None:
    lines = [line for epoch in (1, 2, 3) for line in (
        logged(epoch * 10),
        {"step": epoch * 10, "epoch": epoch, "train_loss": 5.0 - epoch % 3},
        {"step": epoch * 10, "val_loss": None, "train_loss": 3.5},
    )]  # fmt: skip
    make_run("epochs", lines)
    assert "best epoch loss       3.0000 at step 20" in gpt("runs", "show", "epochs").out
    assert gpt("plot", "epochs", "-o", "a.svg").code == 0
    facts = gpt("plot", "epochs", "-o", "a.svg", "--json").json["runs"][0]
    assert (facts["best_epoch_loss"], facts["best_step"], facts["best_val_loss"]) == (3.0, 20, None)
    losses = loss_curves(read_run(Path("runs/epochs")), Axis.STEPS, 99)
    assert losses["epoch mean"].y == (4.0, 3.0, 5.0) and losses.best == (20.0, 3.0)
    page = render(read_run(Path("runs/epochs")), "now")
    assert "Best epoch loss" in page and '"epoch mean"' in page


def test_report_writes_a_page_into_the_run_folder(gpt: Any, run: Path) -> None:
    done = gpt("report")
    assert done.code == 0 and done.out.startswith(str(run / "report.html"))
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "tiny" in page
    found = gpt("report", "tiny", "-o", "page.html", "--json").json
    assert list(found) == ["file", "bytes", "run"] and found["file"] == "page.html"
    assert found["bytes"] == Path("page.html").stat().st_size and found["run"]["step"] == 6
