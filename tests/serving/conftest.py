"""A browser, a server of tiny models, and the page of it."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.browser import Browser, Tab
from support.page import HOSTILE, SPOKEN, Open
from support.runs import settings
from support.serving import Served, serving


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A browser for all tests; each opens tabs that share nothing."""
    with Browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="session")
def served_runs(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
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


@pytest.fixture(scope="session")
def pages(served_runs: list[Path]) -> Iterator[Served]:
    """A server of both."""
    with serving(*map(str, served_runs)) as served:
        yield served


@pytest.fixture
def visit(browser: Browser, pages: Served) -> Open:
    """Open the page; words are what its address holds."""

    def opened(held: str = "", url: str = pages.url, **how: Any) -> Tab:
        tab = browser.open(f"{url}/#{held}", **how)
        tab.until("document.documentElement.dataset.ready")
        return tab

    return opened
