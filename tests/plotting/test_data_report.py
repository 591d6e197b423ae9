"""The page of a data folder: complete, and harmless whatever the text holds."""

import json
from pathlib import Path

from gptcli import prepare
from gptcli.config import load_config
from gptcli.data.contents import measure
from gptcli.data.shards import read_manifest
from gptcli.plotting.data_report import render

from .test_report import HOSTILE, Page


def page_of(rows: list[dict[str, str]]) -> tuple[str, Page]:
    """Prepare rows and return the page of the folder."""
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {"data.source": "rows.jsonl", "data.dir": "<b>rows", "tokenizer.name": "bytes"}
    folder = prepare(load_config(None, flags=flags)).folder
    manifest = read_manifest(folder)
    source = render(folder, manifest, measure(folder, manifest), "now")
    return source, Page(source)


def test_the_page_has_every_section() -> None:
    rows = [{"text": f"A text of {i % 50} words, {'and more ' * (i % 9)}"} for i in range(200)]
    _, page = page_of(rows)
    assert page.open == [] and "script" not in page.tags
    for title in ("Lengths of documents", "Duplicates", "Characters", "Most frequent tokens",
                  "Samples", "Folder", "Latin letters", "64 to 127 tokens"):  # fmt: skip
        assert title in page.text
    assert page.tags.count("rect") > 20


def test_text_is_shown_and_never_obeyed() -> None:
    rows = [{"text": HOSTILE.removesuffix("\ud800") + str(i % 30)} for i in range(120)]
    source, page = page_of(rows)
    assert page.open == [] and not {"script", "img", "b"} & {*page.tags}
    assert "</script><script>alert(1)</script>" in page.text
    assert "\x1b" not in source and "\u202e" not in source


def test_a_folder_of_conversations_has_a_page() -> None:
    _, page = page_of([{"prompt": f"What is {i}?", "completion": f"{i}"} for i in range(30)])
    assert "Lengths of conversations" in page.text and "What is" in page.text
