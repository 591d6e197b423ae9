"""`gpt report`: what it writes and prints."""

from pathlib import Path
from typing import Any


def test_report_writes_a_page_into_the_run_folder(gpt: Any, run: Path) -> None:
    done = gpt("report")
    assert done.code == 0 and done.out.startswith(str(run / "report.html"))
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>") and "tiny" in page
    found = gpt("report", "tiny", "-o", "page.html", "--json").json
    assert list(found) == ["file", "bytes", "run"] and found["file"] == "page.html"
    assert found["bytes"] == Path("page.html").stat().st_size and found["run"]["step"] == 6
