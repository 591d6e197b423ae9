"""A headless Chromium, driven over a pipe in the DevTools protocol; nothing else is needed."""

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Self

PROGRAM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
     if (found := shutil.which(name))),
    None,
)  # fmt: skip
WHY_NOT = "no Chromium here (.ci/run installs it)"
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
         "--hide-scrollbars", "--no-first-run", "--remote-debugging-pipe")  # fmt: skip
SECONDS = 60.0
KEYS = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39,
        "ArrowDown": 40, "End": 35, "Home": 36, "Backspace": 8}  # fmt: skip
ALT, CONTROL, SHIFT = 1, 2, 8


class Browser:
    """A browser of an empty profile; commands go in and answers and events come out."""

    def __init__(self, profile: Path) -> None:
        assert PROGRAM is not None
        to_it, self._write = os.pipe()
        self._read, from_it = os.pipe()
        # A browser looks for the two ends at descriptors 3 and 4.
        remap = f'exec "$0" "$@" 3<&{to_it} 4>&{from_it}'
        self._process = subprocess.Popen(
            ["bash", "-c", remap, PROGRAM, *FLAGS, f"--user-data-dir={profile}"],
            pass_fds=(to_it, from_it), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_it)
        os.close(from_it)
        self._held, self._n_sent = b"", 0
        self.events: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.send("Browser.close")
            self._process.wait(SECONDS)
        finally:
            self._process.kill()  # one that does not answer
            self._process.wait()
            os.close(self._write)
            os.close(self._read)

    def send(self, method: str, session: str | None = None, **params: Any) -> Any:
        """Send a command and return its answer; what happens meanwhile goes to `events`."""
        self._n_sent += 1
        command: dict[str, Any] = {"id": self._n_sent, "method": method, "params": params}
        command |= {"sessionId": session} if session else {}
        os.write(self._write, json.dumps(command).encode() + b"\0")
        end = time.monotonic() + SECONDS  # of all that comes before the answer
        while (answer := self._receive(end)).get("id") != self._n_sent:
            self.events.append(answer)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def _receive(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._held:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            assert ready, "the browser does not answer"
            read = os.read(self._read, 1 << 20)
            assert read, "the browser ended"
            self._held += read
        message, _, self._held = self._held.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def open(self, url: str, width: int = 1280, height: int = 860, **features: str) -> "Tab":
        """Open a tab, with media features such as `prefers-color-scheme`, `_` for `-`."""
        context = self.send("Target.createBrowserContext")["browserContextId"]
        may = ["clipboardReadWrite", "clipboardSanitizedWrite"]
        self.send("Browser.grantPermissions", permissions=may, browserContextId=context)
        target = self.send("Target.createTarget", url="about:blank", browserContextId=context)
        found = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        tab = Tab(self, found["sessionId"])
        for domain in ("Page", "Runtime", "Log", "Network"):
            tab.send(f"{domain}.enable")
        tab.send("Emulation.setDeviceMetricsOverride", width=width, height=height,
                 deviceScaleFactor=1, mobile=False)  # fmt: skip
        named = [{"name": name.replace("_", "-"), "value": v} for name, v in features.items()]
        tab.send("Emulation.setEmulatedMedia", features=named)
        tab.send("Page.navigate", url=url)
        return tab


class Tab:
    """One tab, and what a person does in it."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session

    def send(self, method: str, **params: Any) -> Any:
        """Send a command to this tab."""
        return self._browser.send(method, self._session, **params)

    def events(self, method: str) -> list[dict[str, Any]]:
        """Return the parameters of what happened in this tab."""
        self.value("0")  # what happened before has arrived before its answer
        happened = [event for event in self._browser.events if event["method"] == method]
        return [one["params"] for one in happened if one.get("sessionId") == self._session]

    def value(self, expression: str) -> Any:
        """Return what an expression of JavaScript is worth; a promise is waited for."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True,
                          awaitPromise=True)  # fmt: skip
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, expression: str) -> Any:
        """Wait until an expression is true, and return it."""
        end = time.monotonic() + SECONDS
        tried = f"(() => {{ try {{ return {expression} }} catch {{}} }})()"
        while not (found := self.value(tried)):
            assert time.monotonic() < end, f"in vain: {expression}\n{self.text('body')}"
            time.sleep(0.02)
        return found

    def text(self, selector: str) -> str:
        """Return the text that is shown of an element."""
        found: str = self.value(f"document.querySelector({json.dumps(selector)}).innerText")
        return found

    def place(self, selector: str) -> tuple[float, float]:
        """Scroll to an element and return its center."""
        x, y = self.value(
            f"(() => {{ const node = document.querySelector({json.dumps(selector)});"
            "node.scrollIntoView({block: 'center'}); const box = node.getClientRects()[0];"
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        return x, y

    def point(self, selector: str) -> None:
        """Move the pointer onto an element."""
        x, y = self.place(selector)
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str) -> None:
        """Click an element."""
        self.point(selector)
        x, y = self.place(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left",
                      buttons=int(kind == "mousePressed"), clickCount=1)  # fmt: skip

    def type(self, text: str) -> None:
        """Type a text where the focus is."""
        self.send("Input.insertText", text=text)

    def press(self, key: str, modifiers: int = 0) -> None:
        """Press a key, such as Enter or a letter."""
        code = KEYS.get(key, ord(key[0].upper()))
        text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
        sent = {"text": text} if text and not modifiers & ~SHIFT else {}
        for kind, more in (("keyDown", sent), ("keyUp", {})):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, modifiers=modifiers,
                      windowsVirtualKeyCode=code, **more)  # fmt: skip

    def picture(self, file: Path) -> None:
        """Save what is seen as PNG."""
        found = self.send("Page.captureScreenshot", format="png")
        file.write_bytes(base64.b64decode(found["data"]))
