"""The page in a real browser: writing, alternatives, comparing, the steps of a run."""

import json
from pathlib import Path

import pytest

from gptcli.serving.page import page
from support.browser import CONTROL, PROGRAM, SHIFT, WHY_NOT
from support.page import HOSTILE, SPOKEN, Open, asked, choose, drawn, finish, go_on, plain, value
from support.processes import until
from support.serving import Served

pytestmark = pytest.mark.skipif(PROGRAM is None, reason=WHY_NOT)


def test_the_page_is_small_and_asks_for_nothing_else(visit: Open, pages: Served) -> None:
    body, headers = page()
    assert len(body) < 100_000
    assert "unsafe" not in headers["Content-Security-Policy"]
    tab = visit()
    urls = [one["request"]["url"] for one in tab.events("Network.requestWillBeSent")]
    assert [url.split("#")[0] for url in urls] == [
        f"{pages.url}/",
        f"{pages.url}/v1/models",
    ]
    assert tab.events("Runtime.exceptionThrown") == tab.events("Log.entryAdded") == []


def test_the_page_is_there_within_200_ms(visit: Open) -> None:
    tab, seconds = visit(), []
    for _ in range(5):
        tab.send("Page.reload", ignoreCache=True)
        tab.until("performance.getEntriesByType('navigation')[0].loadEventEnd > 0")
        seconds.append(tab.value("performance.getEntriesByType('navigation')[0].loadEventEnd"))
    assert min(seconds) < 200


def test_a_model_is_described_as_its_run_describes_it(
    visit: Open, pages: Served, served_runs: list[Path]
) -> None:
    facts = {model["id"]: model["gptcli"] for model in pages.json("/v1/models")[1]["data"]}
    for run in served_runs:
        counted = json.loads((run / "run.json").read_text())["parameters"]
        assert facts[run.name]["parameters"] == counted
    shown = visit("model=parrot").text("#facts")
    assert shown.startswith("step 120 · ") and "context of 48 tokens · validation loss 0.0" in shown


def test_a_text_grows_as_the_model_writes_it(visit: Open, pages: Served) -> None:
    tab = visit("seed=3&max_tokens=400&temperature=1")
    tab.value(
        "window.lengths = new Set(); new MutationObserver((_, seen) =>"
        "lengths.add(document.querySelector('#write .tokens').textContent.length))"
        ".observe(document.querySelector('#write .tokens'), {childList: true}), 0"
    )
    text = go_on(tab, "The")
    how = {"seed": 3, "max_tokens": 400, "temperature": 1}
    assert plain(text) == "The" + drawn(pages, "tiny", "The", **how)
    assert tab.value("lengths.size") > 3
    assert finish(tab).endswith("seed 3") and " tokens · " in finish(tab)


def test_the_model_continues_at_the_cursor_and_by_the_ids_it_drew(
    visit: Open, pages: Served
) -> None:
    tab = visit("model=parrot&temperature=0&max_tokens=5")
    first = go_on(tab, "<script>")
    second = go_on(tab)
    assert asked(tab)[1]["prompt"] == [*first.encode()]
    assert second == "<script>" + drawn(pages, "parrot", "<script>", temperature=0, max_tokens=10)
    tab.value("document.querySelector('#write textarea').setSelectionRange(8, 8)")
    tab.press("Enter", CONTROL)
    finish(tab)
    assert value(tab) == first + second.removeprefix("<script>")
    for expected in (second, first, "<script>"):
        tab.press("z", CONTROL)
        assert value(tab) == expected
    tab.press("z", CONTROL | SHIFT)
    assert value(tab) == first


def test_escape_stops_and_frees_the_place(visit: Open, pages: Served) -> None:
    tab = visit("model=parrot&temperature=0&max_tokens=60000")
    tab.click("#write textarea")
    tab.type("The")
    tab.press("Enter", CONTROL)
    tab.until("document.querySelectorAll('#write .t').length > 20")
    tab.press("Escape")
    assert finish(tab) == "Stopped."
    until(lambda: not any(model.n_jobs for model in pages.models.served.values()))
    assert len(value(tab)) > 10
    tab.type("!")
    assert value(tab).endswith("!")


def test_an_alternative_is_shown_on_hover_and_taken_on_a_click(visit: Open, pages: Served) -> None:
    tab = visit("model=parrot&seed=4&max_tokens=12")
    text = go_on(tab, "<script>")
    tab.point("#write .t:nth-child(5)")
    letter = choose(tab)
    assert tab.text("#pop [aria-current] b") == text[12].replace(" ", "␣")
    shares = [float(part.strip("<%")) for part in tab.text("#pop").split() if "%" in part]
    assert 5 <= len(shares) <= 6 and 0 <= sum(shares) <= 101
    tab.click("#chosen")
    tab.until("document.querySelector('#pop').hidden")
    finish(tab)
    prompt = [*text[:12].encode(), ord(letter)]
    assert asked(tab)[-1]["prompt"] == prompt
    expected = drawn(pages, "parrot", prompt, seed=4, max_tokens=12)
    assert value(tab) == text[:12] + letter + expected


def test_a_text_is_undone_by_typing_and_tokens_that_are_cut_are_plain(visit: Open) -> None:
    tab = visit("model=parrot&temperature=0&max_tokens=6")
    text = go_on(tab, "<script>")
    assert tab.value("document.querySelectorAll('#write .t').length") == 6
    tab.press("Backspace")
    tab.press("ArrowLeft")
    tab.press("ArrowLeft")
    tab.type("XY")
    assert value(tab) == text[:-3] + "XY" + text[-3:-1]
    assert tab.value("document.querySelector('#write .tokens').textContent") == value(tab)
    assert tab.value("document.querySelectorAll('#write .t').length") == 5
    tab.press("Enter", CONTROL)
    finish(tab)  # what was edited is tokenized again
    assert asked(tab)[-1]["prompt"] == text[:-3] + "XY"


def test_what_is_done_is_shown_however_late_frames_come(visit: Open) -> None:
    late = (
        "window.requestAnimationFrame = (work) => setTimeout(work, 300);"
        "window.cancelAnimationFrame = clearTimeout, 0"
    )
    tab = visit("mode=compare&model=parrot&with=parrot&temperature=0&max_tokens=6")
    tab.value(late)
    go_on(tab, "<script>", "compare", ".prompt")
    assert tab.value("document.querySelectorAll('#compare .t').length") == 2 * 6
    tab = visit("model=parrot&temperature=0&max_tokens=6")
    tab.value(late)
    text = go_on(tab, "<script>")
    tab.press("ArrowLeft")
    tab.value("new Promise((done) => requestAnimationFrame(done))")
    tab.type("X")  # where the caret was moved to, not where the model had ended
    assert value(tab) == text[:-1] + "X" + text[-1]


def test_what_a_model_says_is_text(visit: Open) -> None:
    tab = visit("model=parrot&temperature=0&max_tokens=90")
    text = go_on(tab, HOSTILE + "\n<script>")
    assert text.startswith(f"{HOSTILE}\n<script>") and text.count(SPOKEN) >= 2
    assert tab.value("document.querySelector('#write .tokens').textContent") == text
    assert tab.value("window.alarm === undefined && document.images.length === 0")
    assert tab.value("document.scripts.length") == 1


def test_two_checkpoints_continue_one_prompt_with_one_seed(visit: Open, pages: Served) -> None:
    tab = visit("mode=compare&model=tiny&with=tiny@3&seed=9&max_tokens=30&temperature=1")
    go_on(tab, "The", "compare", ".prompt")
    how = {"seed": 9, "max_tokens": 30, "temperature": 1}
    for column, model in enumerate(("tiny", "tiny@3"), 1):
        article = f"#compare article:nth-child({column})"
        assert tab.text(f"{article} h2").startswith(model)
        text = tab.value(f"document.querySelector('{article} .tokens').textContent")
        assert plain(text) == "The" + drawn(pages, model, "The", **how)
    tab = visit("mode=compare&model=parrot&with=tiny&temperature=0&max_tokens=9")
    go_on(tab, "<script>", "compare", ".prompt")
    tab.point("#compare .t:nth-child(3)")
    letter = choose(tab)
    tab.click("#chosen")
    finish(tab, "compare")
    text = tab.value("document.querySelector('#compare .tokens').textContent")
    assert text.startswith("<script>wi" + letter)


def test_the_slider_goes_through_the_steps_of_a_run(visit: Open, pages: Served) -> None:
    tab = visit("mode=steps&model=tiny&temperature=1&seed=2&max_tokens=20")
    tab.until("document.querySelector('#steps output').textContent")
    assert tab.text("#steps output") == "6 (checkpoint kept)"
    tab.value("document.querySelector('#step').focus()")
    tab.press("Home")
    assert tab.text("#steps output") == "2"
    assert tab.text("#steps .shown") == f"<i>2{HOSTILE}"
    assert tab.value("window.alarm === undefined && document.images.length === 0")
    assert tab.value("document.querySelector('#steps .kept').hidden")
    tab.press("ArrowRight")
    assert tab.text("#steps output") == "3 (checkpoint kept)"
    tab.click("#steps .go")
    finish(tab, "steps")
    text = tab.value("document.querySelector('#steps .kept .tokens').textContent")
    how = {"seed": 2, "max_tokens": 20, "temperature": 1}
    assert plain(text) == "<i>" + drawn(pages, "tiny@3", "<i>", **how)
    tab.click("#steps .open")
    assert value(tab, "#model") == "tiny@3" and not tab.value("document.body.hidden")
    assert tab.value("!document.querySelector('#write').hidden")
