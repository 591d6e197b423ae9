"""What a person does on the page of `gpt serve`, and what is seen then."""

import json
from collections.abc import Callable
from typing import Any

from support.browser import CONTROL, Tab
from support.serving import Served

HOSTILE = "</textarea><script>window.alarm = 1</script><img src=x onerror=alarm()>"
SPOKEN = "<script>window.alarm=1</script> café\n"
Open = Callable[..., Tab]


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
