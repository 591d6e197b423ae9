"""The page in a real browser: the script runs, the curves are there, nothing is wider than it."""

import re
import subprocess
from pathlib import Path

import pytest

from gptcli.plotting import page as pages
from gptcli.plotting.report import render
from gptcli.runs import read_run
from support.browser import PROGRAM, WHY_NOT
from support.runs import Logged, MakeRun

pytestmark = pytest.mark.skipif(PROGRAM is None, reason=WHY_NOT)
PROBE = """<script>addEventListener("load", () => {
  document.body.dataset.overflow = document.documentElement.scrollWidth - innerWidth;
  document.body.dataset.alarm = String(window.alarm);
  const charts = [...document.querySelectorAll("figure > svg")];
  const box = charts[1].getBoundingClientRect();
  const clientX = box.left + box.width / 2;
  charts[1].dispatchEvent(new PointerEvent("pointermove", {clientX, clientY: box.top + 50}));
  document.body.dataset.told = document.querySelector("figcaption").textContent;
});</script></body>"""


def dom(file: Path, profile: Path) -> str:
    """Return the page as it stands in the browser after its script has run."""
    assert PROGRAM is not None
    done = subprocess.run(
        [PROGRAM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
         f"--user-data-dir={profile}", "--window-size=500,900", "--virtual-time-budget=3000",
         "--dump-dom", file.resolve().as_uri()],
        capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return done.stdout.decode()


@pytest.fixture
def page(make_run: MakeRun, logged: Logged, tmp_path: Path) -> Path:
    """The report of a run whose samples would do harm."""
    lines = [logged(step) for step in range(1, 201)]
    lines += [{"step": 200, "val_loss": 2.5, "train_loss": 2.0}]
    texts = ["</pre></script><script>window.alarm = 1</script>", "\u202e\x07<b>", "wide" * 500]
    samples = [{"step": i, "prompt": "<i>", "text": text} for i, text in enumerate(texts)]
    file = tmp_path / "report.html"
    pages.write(file, render(read_run(make_run("a", lines, samples)), "now"))
    return file


def test_every_chart_is_drawn_and_the_values_are_told(page: Path, tmp_path: Path) -> None:
    found = dom(page, tmp_path / "profile")
    drawn = re.search(r'<html[^>]* data-drawn="(\d+)"', found)
    assert drawn is not None and int(drawn[1]) == 5
    assert re.search(r'<p id="error"></p>', found)
    assert len(re.findall(r'<path d="M[\d.]+,[\d.]+L', found)) >= 6
    assert "NaN" not in found and "undefined" not in found.split("<script")[0]
    assert "step 200, 12.8k tokens, 6.67 min" in found and "validation 2.5000" in found


@pytest.mark.parametrize("axis", ["steps", "tokens", "time"])
def test_what_is_chosen_is_obeyed(page: Path, tmp_path: Path, axis: str) -> None:
    source = page.read_text(encoding="utf-8").replace('value="steps" checked', 'value="steps"')
    source = source.replace(f'value="{axis}"', f'value="{axis}" checked')
    source = source.replace('name="log"', 'name="log" checked')
    page.write_text(source.replace('name="smooth" checked', 'name="smooth"'), encoding="utf-8")
    found = dom(page, tmp_path / "profile")
    assert 'data-drawn="5"' in found and "NaN" not in found
    assert "training, smoothed</" not in found and "training, smoothed 4" not in found
    unit = {"steps": ">200<", "tokens": ">10k<", "time": ">6 min<"}[axis]
    assert unit in found


def test_nothing_of_a_run_is_run_nothing_is_too_wide_and_the_pointer_is_followed(
    page: Path, tmp_path: Path
) -> None:
    # The page's policy would keep the probe from running, too.
    source = page.read_text(encoding="utf-8").replace("</body>", PROBE)
    found = dom_of(source, page, tmp_path)
    assert "data-overflow" not in found, "the policy lets a foreign script run"
    source = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", source)
    found = dom_of(source, page, tmp_path)
    assert 'data-alarm="undefined"' in found
    overflow = re.search(r'data-overflow="(-?\d+)"', found)
    assert overflow is not None and int(overflow[1]) <= 0
    told = re.search(r'data-told="Loss \(nats per token\)step (\d+), ([\d.]+)k tokens', found)
    assert told is not None and 60 < int(told[1]) < 140
    assert float(told[2]) == pytest.approx(int(told[1]) * 0.064, rel=0.02)


def dom_of(source: str, file: Path, tmp_path: Path) -> str:
    """Return what a browser makes of a changed page."""
    file.write_text(source, encoding="utf-8")
    return dom(file, tmp_path / "profile")
