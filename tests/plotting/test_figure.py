"""Pictures: every kind of file, whatever the runs hold."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib import colors, image, rcParams

from gptcli.errors import ConfigError, StorageError
from gptcli.plotting.curves import Axis, Panel
from gptcli.plotting.figure import draw_figure
from gptcli.runs import read_run
from support.runs import Logged, MakeRun


def some_lines(logged: Logged) -> list[dict[str, Any]]:
    steps = [logged(step) for step in range(1, 41)]
    return [*steps, {"step": 40, "val_loss": 2.5, "train_loss": 2.0}]


def has_color(file: Path, name: str) -> bool:
    """Tell whether some pixel of a PNG has nearly a colour."""
    pixels = image.imread(file)[..., :3]
    return bool((abs(pixels - colors.to_rgb(name)).max(axis=2) < 0.02).any())


@pytest.mark.parametrize(("ending", "magic"), [
    ("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF"), ("PNG", b"\x89PNG"),
])  # fmt: skip
def test_the_ending_says_what_kind_of_picture(
    make_run: MakeRun, logged: Logged, ending: str, magic: bytes
) -> None:
    run, file = read_run(make_run("a", some_lines(logged))), Path(f"loss.{ending}")
    draw_figure([run], file)
    first = file.read_bytes()
    assert first.startswith(magic)
    draw_figure([run], file)
    assert file.read_bytes() == first, "the same run gives the same bytes"


def test_training_and_validation_are_drawn_in_their_colours(
    make_run: MakeRun, logged: Logged
) -> None:
    lines = some_lines(logged)
    draw_figure([read_run(make_run("both", lines))], Path("both.png"))
    draw_figure([read_run(make_run("train", lines[:-1]))], Path("train.png"))
    assert has_color(Path("both.png"), "#4c78a8") and has_color(Path("both.png"), "#e4572e")
    assert has_color(Path("train.png"), "#4c78a8") and not has_color(Path("train.png"), "#e4572e")


def test_each_of_several_runs_has_a_colour(make_run: MakeRun, logged: Logged) -> None:
    lines = some_lines(logged)
    runs = [read_run(make_run(name, lines[: 20 + 5 * i])) for i, name in enumerate("abc")]
    draw_figure(runs, Path("abc.png"))
    assert all(has_color(Path("abc.png"), name) for name in ("#4c78a8", "#e4572e", "#2a9d5c"))


@pytest.mark.parametrize("axis", list(Axis))
def test_all_panels_on_every_axis(make_run: MakeRun, logged: Logged, axis: Axis) -> None:
    runs = [read_run(make_run(name, some_lines(logged))) for name in "ab"]
    draw_figure(runs, Path("all.svg"), axis, tuple(Panel))
    draw_figure(runs, Path("lr.svg"), axis, (Panel.LR,))
    assert Path("all.svg").stat().st_size > Path("lr.svg").stat().st_size > 1000


@pytest.mark.parametrize("name", ["$x_{$", "_hidden", "漢字", "a" * 200, "^\\frac"])
def test_names_are_drawn_as_they_are(make_run: MakeRun, logged: Logged, name: str) -> None:
    one, other = (read_run(make_run(each, some_lines(logged))) for each in (name, "b"))
    draw_figure([one, other], Path("names.png"))
    draw_figure([one], Path("name.pdf"))
    assert Path("names.png").stat().st_size > 1000


@pytest.mark.parametrize("lines", [
    [{"step": 5, "val_loss": 2.0, "train_loss": None}],
    [{"step": 1, "tokens": 64, "loss": None, "lr": 0.0, "seconds": 0.0}],
    [{"step": 1, "tokens": 64, "loss": 2.0, "lr": 0.0, "seconds": 0.0}],
    [{"step": 1, "tokens": 64, "loss": 1e38, "lr": 1e-3, "seconds": 1e9}],
], ids=["evaluation", "not-finite", "one-step", "huge"])  # fmt: skip
def test_little_or_strange_numbers_are_drawn(
    make_run: MakeRun, lines: list[dict[str, Any]]
) -> None:
    run = read_run(make_run("little", lines))
    for axis in Axis:
        draw_figure([run], Path("little.png"), axis, tuple(Panel))


def test_a_name_that_is_no_picture_is_refused(make_run: MakeRun, logged: Logged) -> None:
    run = read_run(make_run("a", some_lines(logged)))
    Path("folder.png").mkdir()
    for name, what in (
        ("loss.jpg", "not a picture format"),
        ("loss", "format"),
        ("folder.png", "folder"),
    ):
        with pytest.raises(ConfigError, match=what):
            draw_figure([run], Path(name))
    with pytest.raises(StorageError, match="cannot create files there"):
        draw_figure([run], Path("nowhere/loss.png"))


def test_matplotlib_is_left_as_it_was(make_run: MakeRun, logged: Logged) -> None:
    before = dict(rcParams)
    draw_figure([read_run(make_run("a", some_lines(logged)))], Path("a.png"))
    assert dict(rcParams) == before
