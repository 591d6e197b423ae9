"""The page: complete, harmless whatever a run holds, and asking nobody for anything."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from gptcli.plotting.page import fill
from gptcli.plotting.report import render
from gptcli.runs import read_run
from support.runs import Logged, MakeRun

HOSTILE = (
    "</script><script>alert(1)</script><img src=http://evil.example/x>\x1b[31m\x00\u202e&amp;\ud800"
)
VOID = {"meta", "link", "input", "br", "img"}


class Page(HTMLParser):
    """A page's elements and text, and whether each that was opened is closed."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def tags(self) -> list[str]:
        return [tag for tag, _ in self.elements]


def numbers(source: str) -> dict[str, Any]:
    """Return what the page's script is given."""
    found = re.search(r'<script type="application/json" id="numbers">(.*?)</script>', source, re.S)
    assert found is not None
    value: dict[str, Any] = json.loads(found[1])
    return value


def test_a_trained_run_is_told_whole(run: Path) -> None:
    found = read_run(run)
    source = render(found, "now")
    page = Page(source)
    assert page.open == []
    assert found.best is not None
    for part in ("Curves", "Evaluations", "Samples", "Where the time went", "Configuration",
                 "Data", "Environment", "Checkpoints", f"{found.best.val_loss:.4f}", "best.pt",
                 found.facts.data.fingerprint, found.facts.torch, "model.n_layer",
                 "all ", "after step 6", "corpus.txt"):  # fmt: skip
        assert part and part in page.text, part
    assert page.tags.count("figure") == len(numbers(source)["charts"]) == 5


def test_time_that_nobody_accounted_for_is_told(make_run: MakeRun, logged: Logged) -> None:
    folder = make_run("a", [logged(50)])
    status = {"state": "stopped", "seconds_by_work": {"steps": 15.0, "saving": 5.0}}
    (folder / "status.json").write_text(json.dumps(status))
    assert "20 s of 100 s are accounted for" in render(read_run(folder), "now")
    status["seconds_by_work"] = {"steps": 75.0, "saving": 25.0}
    (folder / "status.json").write_text(json.dumps(status))
    source = render(read_run(folder), "now")
    assert "accounted" not in source and "75 s</td><td>75.0%" in source


def test_the_numbers_are_those_of_the_metrics(make_run: MakeRun, logged: Logged) -> None:
    lines = [logged(step) for step in range(1, 41)]
    lines += [{"step": 40, "val_loss": 2.5, "train_loss": 2.0}]
    given = numbers(render(read_run(make_run("a", lines)), "now"))
    loss = given["charts"][0]
    series = {one["name"]: one for one in loss["series"]}
    assert list(series) == ["training", "training, smoothed", "training, evaluated", "validation"]
    assert series["training"]["values"][:2] == [4.9, 4.8]
    assert series["validation"]["steps"] == [40] and loss["best"] == [40, 2.5]
    assert given["tokens"][1][-1] == 40 * 64 and given["seconds"][1][-1] == 80.0


def test_a_long_run_makes_no_long_page(make_run: MakeRun, logged: Logged) -> None:
    samples = [{"step": i, "prompt": "", "text": f"sample{i}."} for i in range(1, 1001)]
    run = read_run(make_run("a", [logged(step) for step in range(1, 20_001)], samples))
    source = render(run, "now")
    assert len(source) < 400_000
    assert "sample1." in source and "sample1000." in source and "60 of 1000" in source


def test_the_page_asks_nobody_for_anything(run: Path) -> None:
    source = render(read_run(run), "now")
    page = Page(source)
    for tag, attributes in page.elements:
        assert tag not in ("img", "iframe", "object", "embed", "base")
        assert not {"src", "srcset", "action", "style"} & attributes.keys()
        assert attributes.get("href", "data:,") == "data:,"
    policy = next(a["content"] for _, a in page.elements if a.get("http-equiv"))
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    assert "@import" not in source and "fetch(" not in source and "innerHTML" not in source


@pytest.mark.parametrize("where", ["sample", "prompt", "command", "setting", "error", "source"])
def test_text_of_a_run_is_shown_and_never_obeyed(
    make_run: MakeRun, logged: Logged, where: str
) -> None:
    plain = render(read_run(make_run("plain", [logged(1)], [])), "now")
    folder = make_run("hostile", [logged(1)])
    line = {"step": 1, "prompt": "", "text": "x"}
    match where:
        case "sample":
            line["text"] = HOSTILE
        case "prompt":
            line["prompt"] = HOSTILE
        case "command":
            (folder / "run.json").write_text(json.dumps({"command": ["train", HOSTILE]}))
        case "setting":
            (folder / "config.yaml").write_text(json.dumps({"name": HOSTILE.replace("\x00", "")}))
        case "error":
            (folder / "status.json").write_text(json.dumps({"state": HOSTILE, "error": HOSTILE}))
        case "source":
            data = {"source": HOSTILE, "dir": HOSTILE}
            (folder / "run.json").write_text(json.dumps({"data": data, "platform": HOSTILE}))
    (folder / "samples.jsonl").write_text(json.dumps(line) + "\n")
    source = render(read_run(folder), "now")
    source.encode("utf-8")
    page = Page(source)
    assert page.tags.count("script") == Page(plain).tags.count("script") == 2
    assert "img" not in page.tags
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", source)
    if where in ("sample", "prompt"):
        assert "<script>alert(1)</script>" in page.text


@pytest.mark.skipif("sys.platform == 'win32'", reason="no such folder names there")
def test_a_run_with_a_hostile_name_is_harmless(make_run: MakeRun, logged: Logged) -> None:
    name = '<img src=x onerror=alert(1)>"&\x1b[2J'
    source = render(read_run(make_run(name, [logged(1)])), "now")
    page = Page(source)
    assert "img" not in page.tags and "\x1b" not in source
    assert "<img src=x onerror=alert(1)>" in page.text


def test_a_run_without_a_logged_step_has_a_page_too(make_run: MakeRun) -> None:
    source = render(read_run(make_run("empty")), "now")
    page = Page(source)
    assert "Nothing is logged yet." in page.text and "figure" not in page.tags
    assert numbers(source)["charts"] == [] and "status.json: is missing" in page.text


def test_numbers_for_the_script_cannot_leave_their_element(
    make_run: MakeRun, logged: Logged
) -> None:
    name = "</script><!-- & \u2028"
    losses = {name: {"val_loss": 2.0, "train_loss": 3.0}}
    line = {"step": 1, "val_loss": 2.0, "train_loss": 3.0, "sources": losses}
    source = render(read_run(make_run("a", [logged(1), line])), "now")
    assert name in [one["name"] for one in numbers(source)["charts"][0]["series"]]
    assert Page(source).tags.count("script") == 2 and "\u2028" not in source.split("numbers")[1]
    with pytest.raises(ValueError):
        fill("page.html", name="a", tiles=[], now="now", folder=Path(), script="page.js",
             numbers=float("nan"))  # fmt: skip
