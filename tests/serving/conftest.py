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


def learn(folder: Path, source: str, *overrides: str) -> Path:
    """Train a model until it knows a text, and return its run."""
    from gptcli import cli

    data, run = folder / f"{source}.data", folder / source.partition(".")[0]
    words = ["-s", "tokenizer.name=bytes", "--out", str(data)]
    assert cli.run(["prepare", str(folder / source), *words]) == 0
    learned = settings(
        f"data.dir={data}", f"run_dir={run}", "model.n_embd=64", "train.eval_every=1000",
        "train.micro_batch_size=8", "train.log_every=100", "optim.lr=5e-3", *overrides,
        name=run.name,
    )  # fmt: skip
    assert cli.run(["train", *(part for word in learned for part in ("-s", word))]) == 0
    return run


@pytest.fixture(scope="session")
def served_runs(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The tiny run with samples that would do harm; a model of one text, and one that chats."""
    folder = tmp_path_factory.mktemp("served")
    tiny = Path(shutil.copytree(finished_run, folder / "tiny"))
    rows = [{"step": step, "prompt": "<i>", "text": f"{step}{HOSTILE}"} for step in (2, 3, 6)]
    (tiny / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "parrot.txt").write_text(SPOKEN * 400, encoding="utf-8")
    talk = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "<b>I</b>"}]
    (folder / "fox.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 300)
    parrot = learn(folder, "parrot.txt", "model.block_size=48", "train.max_steps=120")
    return [tiny, parrot, learn(folder, "fox.jsonl", "model.block_size=96", "train.max_steps=150")]


@pytest.fixture(scope="session")
def pages(served_runs: list[Path]) -> Iterator[Served]:
    """A server of them."""
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
