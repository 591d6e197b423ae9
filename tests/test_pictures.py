"""The pictures of docs/img show what the program prints now; `make docs` draws them again."""

import html
import importlib.util
import re
import sys
from pathlib import Path

import pytest

from gptcli.terminal.live import frame
from support.commands import Gpt

from .terminal.test_live import board

IMAGES = Path(__file__).parents[1] / "docs" / "img"
WIDTH = 98  # of docs/pictures.py
_WORD = re.compile(r"[A-Za-z]+")
_NUMBER = re.compile(r"\d[\d,.]*(?:e[-+]\d+)?%?")


def words_of(name: str) -> list[str]:
    """Return the words that a picture shows, line by line."""
    svg = (IMAGES / f"{name}.svg").read_text(encoding="utf-8")
    pieces = re.findall(r'<text[^>]*? x="([\d.]+)" y="([\d.]+)"[^>]*>(.*?)</text>', svg)
    placed = sorted((float(y), float(x), html.unescape(text)) for x, y, text in pieces)
    return " ".join(text for _, _, text in placed).replace("\xa0", " ").split()


def without_numbers(words: list[str]) -> list[str]:
    """Leave out what differs from run to run."""
    return [word for word in (_NUMBER.sub("", word).strip("(),;") for word in words) if word]


@pytest.mark.parametrize(
    ("name", "commands"),
    [
        ("help", [["--help"]]),
        ("error", [["train", "-c", "quickstart", "-s", "model.n_heads=8"]]),
        ("explain", [["config", "explain", key] for key in ("train.loggers", "optim.lr")]),
    ],
)
def test_a_picture_shows_the_present_text(
    name: str, commands: list[list[str]], gpt: Gpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    shown = set(_WORD.findall(" ".join(words_of(name))))
    typed = " ".join(word for command in commands for word in command)
    printed = typed + "".join(done.out + done.err for done in (gpt(*c) for c in commands))
    missing = shown - set(_WORD.findall(printed)) - {"gpt"}
    assert not missing, f"{name}.svg is out of date: run `make docs`"


def test_the_picture_of_training_has_the_labels_of_the_display() -> None:
    shown = words_of("train")
    lines = [line.plain for line in frame(board(), WIDTH, 30, 60.0)]
    labels = [word for line in lines[2:8] for word in re.findall(r"\b[a-z]+(?:/s)?\b", line)]
    known = {"of", "at", "s", "ago", "step", "never", "tokens", "not", "yet", "kB", "min", "h", "e"}
    assert labels and set(labels) - known <= set(shown), "train.svg is out of date: run `make docs`"


def test_the_picture_of_an_evaluation_has_the_words_of_one(finished_run: Path, gpt: Gpt) -> None:
    data = str(finished_run.parents[1] / "data/tiny")
    done = gpt("eval", str(finished_run / "best.pt"), "--data", data, "--baselines")
    printed = set(without_numbers(done.out.split()))
    words = [word for word in words_of("eval") if not re.fullmatch("[0-9a-f]{64};?", word)]
    shown = [word for word in without_numbers(words) if "/" not in word]
    figures = shown[shown.index("nats") :]
    assert set(figures[: figures.index("xz")]) <= printed | {"validation"}


@pytest.mark.slow
def test_a_browser_that_fails_ends_the_server_too(
    finished_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The picture of the page once waited forever for a server that nobody had ended."""
    monkeypatch.setattr("support.browser.PROGRAM", "false")
    spec = importlib.util.spec_from_file_location("pictures", IMAGES.parent / "pictures.py")
    assert spec is not None and spec.loader is not None
    pictures = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "pictures", pictures)  # for its dataclass
    spec.loader.exec_module(pictures)
    with pytest.raises((AssertionError, BrokenPipeError)):
        pictures.photograph(finished_run.parents[1])
