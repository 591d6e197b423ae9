"""The page in a real browser: what a person does with it, against a server of tiny models."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from gptcli.serving.page import page
from support.browser import ALT, CONTROL, PROGRAM, SHIFT, WHY_NOT, Browser, Tab
from support.processes import until
from support.runs import settings
from support.serving import Served, serving

pytestmark = pytest.mark.skipif(PROGRAM is None, reason=WHY_NOT)
HOSTILE = "</textarea><script>window.alarm = 1</script><img src=x onerror=alarm()>"
SPOKEN = "<script>window.alarm=1</script> café\n"
Open = Callable[..., Tab]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser for all tests; each opens tabs that share nothing."""
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def runs(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The tiny run, with samples that would do harm, and one that can say nothing but SPOKEN."""
    from gptcli import cli

    folder = tmp_path_factory.mktemp("served")
    tiny = Path(shutil.copytree(finished_run, folder / "tiny"))
    rows = [{"step": step, "prompt": "<i>", "text": f"{step}{HOSTILE}"} for step in (2, 3, 6)]
    (tiny / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "spoken.txt").write_text(SPOKEN * 400, encoding="utf-8")
    words = ["-s", "tokenizer.name=bytes", "--out", str(folder / "data")]
    assert cli.run(["prepare", str(folder / "spoken.txt"), *words]) == 0
    learned = settings(
        f"data.dir={folder / 'data'}", f"run_dir={folder / 'parrot'}", "model.block_size=48",
        "model.n_embd=64", "train.max_steps=120", "train.eval_every=120", "optim.lr=5e-3",
        "train.micro_batch_size=8", name="parrot",
    )  # fmt: skip
    assert cli.run(["train", *(part for word in learned for part in ("-s", word))]) == 0
    return [tiny, folder / "parrot"]


@pytest.fixture(scope="module")
def server(runs: list[Path]) -> Iterator[Served]:
    """A server of both."""
    with serving(*map(str, runs)) as served:
        yield served


@pytest.fixture
def visit(browser: Browser, server: Served) -> Open:
    """Open the page; words are what its address holds."""

    def opened(held: str = "", url: str = server.url, **how: Any) -> Tab:
        tab = browser.open(f"{url}/#{held}", **how)
        tab.until("document.documentElement.dataset.ready")
        return tab

    return opened


def value(tab: Tab, selector: str = "#write textarea") -> str:
    """Return what a text box holds."""
    found: str = tab.value(f"document.querySelector({json.dumps(selector)}).value")
    return found


def finish(tab: Tab, mode: str = "write") -> str:
    """Wait until the model is done, and return what is said about it."""
    tab.until(f"!document.querySelector('#{mode}').hasAttribute('data-running')")
    return tab.text(f"#{mode} .status")


def go_on(tab: Tab, text: str = "", mode: str = "write", box: str = "textarea") -> str:
    """Type a text, let the model continue it, and return what the text box holds then."""
    tab.click(f"#{mode} {box}")
    tab.type(text)
    tab.press("Enter", CONTROL)
    finish(tab, mode)
    return value(tab, f"#{mode} {box}")


def drawn(server: Served, model: str, prompt: Any, **how: Any) -> str:
    """Return what the server draws, less what a text box cannot hold."""
    status, answer = server.json("/v1/completions", {"model": model, "prompt": prompt} | how)
    assert status == 200, answer
    text: str = answer["choices"][0]["text"]
    return plain(text)


def plain(text: str) -> str:
    """Return a text as a text box holds it, less a character that is not finished at its end."""
    return text.replace("\r", "").rstrip("\ufffd")


def asked(tab: Tab) -> list[dict[str, Any]]:
    """Return the bodies of the requests of a tab."""
    sent = [one["request"] for one in tab.events("Network.requestWillBeSent")]
    return [json.loads(one["postData"]) for one in sent if one["method"] == "POST"]


def choose(tab: Tab) -> str:
    """Wait for the alternatives, choose a plain letter that was not drawn, and return it."""
    tab.until("!document.querySelector('#pop').hidden")
    letter: str = tab.until(
        "(window.row = [...document.querySelectorAll('#pop button:not([aria-current])')]"
        ".find((row) => /^[!-~]$/.test(row.firstChild.textContent))).firstChild.textContent"
    )
    tab.value("row.id = 'chosen'")
    return letter


def test_the_page_is_small_and_asks_for_nothing_else(visit: Open, server: Served) -> None:
    body, headers = page()
    assert len(body) < 100_000
    assert "unsafe" not in headers["Content-Security-Policy"]
    tab = visit()
    urls = [one["request"]["url"] for one in tab.events("Network.requestWillBeSent")]
    assert [url.split("#")[0] for url in urls] == [f"{server.url}/", f"{server.url}/v1/models"]
    assert tab.events("Runtime.exceptionThrown") == tab.events("Log.entryAdded") == []


def test_the_page_is_there_within_200_ms(visit: Open) -> None:
    tab, seconds = visit(), []
    for _ in range(5):
        tab.send("Page.reload", ignoreCache=True)
        tab.until("performance.getEntriesByType('navigation')[0].loadEventEnd > 0")
        seconds.append(tab.value("performance.getEntriesByType('navigation')[0].loadEventEnd"))
    assert min(seconds) < 200


def test_a_text_grows_as_the_model_writes_it(visit: Open, server: Served) -> None:
    tab = visit("seed=3&max_tokens=400&temperature=1")
    tab.value(
        "window.lengths = new Set(); new MutationObserver((_, seen) =>"
        "lengths.add(document.querySelector('#write .tokens').textContent.length))"
        ".observe(document.querySelector('#write .tokens'), {childList: true}), 0"
    )
    text = go_on(tab, "The")
    how = {"seed": 3, "max_tokens": 400, "temperature": 1}
    assert plain(text) == "The" + drawn(server, "tiny", "The", **how)
    assert tab.value("lengths.size") > 3
    assert finish(tab).endswith("seed 3") and " tokens · " in finish(tab)


def test_the_model_continues_at_the_cursor_and_by_the_ids_it_drew(
    visit: Open, server: Served
) -> None:
    tab = visit("model=parrot&temperature=0&max_tokens=5")
    first = go_on(tab, "<script>")
    second = go_on(tab)
    assert asked(tab)[1]["prompt"] == [*first.encode()]
    assert second == "<script>" + drawn(server, "parrot", "<script>", temperature=0, max_tokens=10)
    tab.value("document.querySelector('#write textarea').setSelectionRange(8, 8)")
    tab.press("Enter", CONTROL)
    finish(tab)
    assert value(tab) == first + second.removeprefix("<script>")
    for expected in (second, first, "<script>"):
        tab.press("z", CONTROL)
        assert value(tab) == expected
    tab.press("z", CONTROL | SHIFT)
    assert value(tab) == first


def test_escape_stops_and_frees_the_place(visit: Open, server: Served) -> None:
    tab = visit("model=parrot&temperature=0&max_tokens=60000")
    tab.click("#write textarea")
    tab.type("The")
    tab.press("Enter", CONTROL)
    tab.until("document.querySelectorAll('#write .t').length > 20")
    tab.press("Escape")
    assert finish(tab) == "Stopped."
    until(lambda: not any(model.n_jobs for model in server.models.served.values()))
    assert len(value(tab)) > 10
    tab.type("!")
    assert value(tab).endswith("!")


def test_an_alternative_is_shown_on_hover_and_taken_on_a_click(visit: Open, server: Served) -> None:
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
    expected = drawn(server, "parrot", prompt, seed=4, max_tokens=12)
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


def test_what_a_model_says_is_text(visit: Open) -> None:
    tab = visit("model=parrot&temperature=0&max_tokens=90")
    text = go_on(tab, HOSTILE + "\n<script>")
    assert text.startswith(f"{HOSTILE}\n<script>") and text.count(SPOKEN) >= 2
    assert tab.value("document.querySelector('#write .tokens').textContent") == text
    assert tab.value("window.alarm === undefined && document.images.length === 0")
    assert tab.value("document.scripts.length") == 1


def test_two_checkpoints_continue_one_prompt_with_one_seed(visit: Open, server: Served) -> None:
    tab = visit("mode=compare&model=tiny&with=tiny@3&seed=9&max_tokens=30&temperature=1")
    go_on(tab, "The", "compare", ".prompt")
    how = {"seed": 9, "max_tokens": 30, "temperature": 1}
    for column, model in enumerate(("tiny", "tiny@3"), 1):
        article = f"#compare article:nth-child({column})"
        assert tab.text(f"{article} h2").startswith(model)
        text = tab.value(f"document.querySelector('{article} .tokens').textContent")
        assert plain(text) == "The" + drawn(server, model, "The", **how)
    tab = visit("mode=compare&model=parrot&with=tiny&temperature=0&max_tokens=9")
    go_on(tab, "<script>", "compare", ".prompt")
    tab.point("#compare .t:nth-child(3)")
    letter = choose(tab)
    tab.click("#chosen")
    finish(tab, "compare")
    text = tab.value("document.querySelector('#compare .tokens').textContent")
    assert text.startswith("<script>wi" + letter)


def test_the_slider_goes_through_the_steps_of_a_run(visit: Open, server: Served) -> None:
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
    assert plain(text) == "<i>" + drawn(server, "tiny@3", "<i>", **how)
    tab.click("#steps .open")
    assert value(tab, "#model") == "tiny@3" and not tab.value("document.body.hidden")
    assert tab.value("!document.querySelector('#write').hidden")
