"""The page for everyone: by keyboard, on a phone, in the dark, with a key, and when it fails."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from support.browser import ALT, CONTROL, PROGRAM, SHIFT, WHY_NOT, Tab
from support.page import Open, asked, drawn, finish, go_on, value
from support.serving import Served, serving

pytestmark = pytest.mark.skipif(PROGRAM is None, reason=WHY_NOT)
FOCUS = "document.activeElement"


def walk(tab: Tab, selector: str, modifiers: int = 0) -> None:
    """Press Tab until an element has the focus."""
    for _ in range(30):
        tab.press("Tab", modifiers)
        if tab.value(f"{FOCUS}.matches({json.dumps(selector)})"):
            return
    raise AssertionError(f"Tab does not lead to {selector}")


def test_everything_is_done_without_a_pointer(visit: Open) -> None:
    tab = visit("model=parrot&temperature=0&max_tokens=6")
    walk(tab, "#write textarea")
    tab.type("<script>")
    tab.press("Enter", CONTROL)
    finish(tab)
    text = value(tab)
    tab.press("ArrowLeft")
    assert re.match(r"\S+ [\d.<]+%, instead of \S+ [\d.<]+%", tab.text("#write .token"))
    tab.press("ArrowDown", ALT)
    assert tab.value(f"{FOCUS}.closest('#pop') && !{FOCUS}.hasAttribute('aria-current')")
    tab.press("Escape")
    assert tab.value("document.querySelector('#pop').hidden")
    assert tab.value(f"{FOCUS}.matches('#write textarea')")
    tab.press("ArrowDown", ALT)
    tab.press("ArrowDown")
    tab.press("Enter")
    tab.until("document.querySelector('#pop').hidden")
    finish(tab)
    assert value(tab)[:12] == text[:12] and value(tab)[12] != text[12]
    assert tab.value(f"{FOCUS}.matches('#write textarea')")
    walk(tab, "[role=tab]", SHIFT)
    for mode in ("chat", "compare"):
        tab.press("ArrowRight")
        assert tab.value(f"{FOCUS}.id === 'tab-{mode}' && {FOCUS}.ariaSelected === 'true'")
    walk(tab, "#compare .prompt")
    tab.type("<script>")
    tab.press("Enter", CONTROL)
    finish(tab, "compare")
    walk(tab, "#compare .tokens")
    for _ in range(3):
        tab.press("ArrowRight")
    assert tab.value("[...document.querySelectorAll('.t')].indexOf(document.querySelector('.at'))")
    assert "instead of" in tab.text("#compare .token")
    tab.press("Enter")
    assert tab.value(f"Boolean({FOCUS}.closest('#pop'))")


def test_every_field_and_button_has_a_name(visit: Open) -> None:
    tab = visit()
    tab.send("Accessibility.enable")
    nodes = tab.send("Accessibility.getFullAXTree")["nodes"]
    named = {"button", "textbox", "spinbutton", "combobox", "checkbox", "tab", "slider", "tabpanel"}
    found = [(node["role"]["value"], node["name"]["value"]) for node in nodes
             if not node["ignored"] and node["role"]["value"] in named]  # fmt: skip
    assert len(found) > 15 and all(name for _, name in found), found


@pytest.mark.parametrize("mode", ["write", "chat", "compare", "steps"])
def test_a_phone_shows_it_without_scrolling_sideways(visit: Open, mode: str) -> None:
    tab = visit(f"mode={mode}&temperature=1&max_tokens=40", width=400, height=800)
    if mode in ("write", "compare"):
        go_on(tab, "wide" * 150, mode, {"write": "textarea", "compare": ".prompt"}[mode])
    if mode == "steps":
        tab.until("document.querySelector('#steps .shown').textContent")
    assert tab.value("document.documentElement.scrollWidth") == 400
    assert tab.value(f"!document.querySelector('#{mode}').hidden")


def test_light_and_dark_are_as_the_system_has_it_or_as_chosen(visit: Open) -> None:
    paper = "getComputedStyle(document.body).backgroundColor"
    light, dark = "rgb(253, 253, 252)", "rgb(20, 22, 26)"
    assert visit(prefers_color_scheme="light").value(paper) == light
    tab = visit(prefers_color_scheme="dark")
    assert tab.value(paper) == dark
    tab.click("#theme")
    assert tab.value(paper) == light and "light" in tab.value("theme.title")
    tab.send("Page.reload")
    tab.until("document.documentElement.dataset.ready")
    assert tab.value(paper) == light
    tab.click("#theme")
    assert tab.value(paper) == dark


def test_the_address_holds_the_settings_and_never_the_text(visit: Open) -> None:
    tab = visit("model=parrot&temperature=0&max_tokens=4&mono=1")
    text = go_on(tab, "<script>")
    tab.value("inputs = 0, document.querySelector('#set-top_k').focus()")
    tab.type("7")
    tab.press("Tab")
    held = tab.value("location.hash")
    assert "top_k=7" in held and "model=parrot" in held and "script" not in held
    tab.send("Page.reload")
    tab.until("document.documentElement.dataset.ready")
    assert (value(tab), value(tab, "#set-top_k")) == (text, "7")
    assert tab.value("document.querySelector('#mono').checked")
    assert tab.value("document.querySelector('#set-top_p').placeholder") == "off"


def test_what_is_refused_is_said(visit: Open) -> None:
    tab = visit("temperature=-1")
    go_on(tab, "The")
    assert "Temperature: " in tab.text("#notice")
    tab = visit("stop=" + "%0A".join(map(str, range(17))))
    go_on(tab, "The")
    assert "stop" in tab.text("#notice") and not tab.value("notice.hidden")
    assert value(tab) == "The"
    tab.click("#notice button")
    assert tab.value("notice.hidden")


def test_a_busy_server_and_one_that_is_gone_are_named(visit: Open, served_runs: list[Path]) -> None:
    with serving(str(served_runs[1]), max_texts=1, max_waiting=0) as served:
        first = visit("temperature=0&max_tokens=60000", served.url)
        first.click("#write textarea")
        first.press("Enter", CONTROL)
        first.until("document.querySelectorAll('#write .t').length > 5")
        second = visit("", served.url)
        go_on(second, "The")
        assert re.search(r"busy. Try again in \d+ second", second.text("#notice"))
        first.press("Escape")
        finish(first)
    go_on(second, " end")
    assert f"127.0.0.1:{served.port} does not answer" in second.text("#notice")
    assert "gpt serve" in second.text("#notice") and value(second) == "The end"


def test_a_key_is_asked_for_and_not_shown(visit: Open, browser: Any, served_runs: Any) -> None:
    with serving(str(served_runs[1]), keys=["open sesame"]) as served:
        tab = browser.open(f"{served.url}/#temperature=0&max_tokens=4")
        for said, key in (("asks for", "wrong"), ("does not accept", "open sesame")):
            tab.until(f"notice.innerText.includes({json.dumps(said)})")
            tab.value("document.querySelector('#key-text').value = ''")
            tab.click("#key-text")
            tab.type(key)
            tab.press("Enter")
        tab.until("document.documentElement.dataset.ready")
        assert tab.value("notice.hidden") and len(go_on(tab, "<script>")) == 12
        tab.value("Object.defineProperty(navigator, 'clipboard', {value: undefined}), 0")
        tab.click("#curl")
        tab.until("document.querySelector('#copy').open")
        shown = value(tab, "#copy textarea")
        assert "sesame" not in shown and "Bearer $GPT_API_KEY" in shown
        assert "sesame" not in tab.value("location.href")


def copied(tab: Tab) -> str:
    """Return what was copied."""
    tab.until("document.querySelector('#copied').textContent")
    found: str = tab.value("navigator.clipboard.readText()")
    return found


def test_what_is_copied_runs_and_gives_the_same(visit: Open, pages: Served) -> None:
    tab = visit("model=parrot&seed=5&max_tokens=12&top_k=4&min_p=0.01&stop=%22%0A'%5Cn")
    tab.click("#write textarea")
    tab.type("it's \"<script>")
    tab.click("#curl")
    done = subprocess.run(["bash", "-c", copied(tab)], capture_output=True, check=True)
    how = {"seed": 5, "max_tokens": 12, "top_k": 4, "min_p": 0.01, "stop": ['"', "'\n"]}
    expected = drawn(pages, "parrot", "it's \"<script>", **how)
    assert json.loads(done.stdout)["choices"][0]["text"] == expected
    pytest.importorskip("openai", reason="the program uses OpenAI's package")
    tab = visit("model=parrot&seed=5&max_tokens=12&top_k=4&min_p=0.01&stop=%22%0A'%5Cn")
    tab.click("#write textarea")
    tab.type("it's \"<script>")
    tab.click("#python")
    done = subprocess.run([sys.executable, "-c", copied(tab)], capture_output=True, check=True)
    assert done.stdout.decode() == expected + "\n"


def test_a_base_model_says_that_it_does_not_chat(visit: Open) -> None:
    tab = visit("mode=chat&model=tiny")
    assert "not trained on conversations" in tab.text("#chat .why")
    assert tab.value("document.querySelector('#chat form').hidden") and not asked(tab)


def test_a_model_that_chats_answers_and_is_asked_again(visit: Open, pages: Served) -> None:
    tab = visit("mode=chat&model=fox&temperature=0&max_tokens=20")
    last = "#chat .talk li:last-child"
    for n_messages in (1, 3):
        tab.click("#chat form textarea")
        tab.type("Who?")
        tab.press("Enter")
        assert "reached its end" in finish(tab, "chat")
        messages = asked(tab)[-1]["messages"]
        assert [one["role"] for one in messages] == ["user", "assistant", "user"][:n_messages]
        request = {"model": "fox", "messages": messages, "temperature": 0, "max_tokens": 20}
        _, answer = pages.json("/v1/chat/completions", request)
        assert tab.text(f"{last} div") == answer["choices"][0]["message"]["content"]
        assert n_messages == 3 or tab.text(f"{last} div") == "<b>I</b>"
        assert value(tab, "#chat form textarea") == ""
    tab.click("#chat .again")
    finish(tab, "chat")
    assert asked(tab)[-1] == asked(tab)[-2] | {"seed": asked(tab)[-1]["seed"]}
    tab.click("#chat .clear")
    assert tab.value("document.querySelectorAll('#chat li').length") == 0
    tab.click("#chat summary")
    tab.click("#chat .system")
    tab.type("Be short.")
    tab.click("#chat form textarea")
    tab.type("Who?")
    tab.press("Enter")
    finish(tab, "chat")
    assert asked(tab)[-1]["messages"][0] == {"role": "system", "content": "Be short."}
