"""What is measured once on a machine and kept."""

from pathlib import Path

import pytest

from gptcli.settled import settled


def test_what_is_settled_is_asked_once_for_each_question_and_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)  # the suite too may stand in for one
    asked: list[str] = []

    def ask(answer: str, question: str = "which?") -> str:
        return settled(question, ["a", "b"], lambda: asked.append(answer) or answer)  # type: ignore[func-returns-value]

    assert [ask("a"), ask("b")] == ["a", "a"]
    assert asked == ["a"]
    assert ask("b", "another?") == "b"
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert ask("a") == "a" and asked == ["a", "b", "a"]
    for file in (tmp_path / "gptcli").iterdir():
        file.write_text("{}")
    assert ask("b") == "b"


def test_a_cache_folder_that_cannot_be_written_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert settled("which?", ["a"], lambda: "a") == "a"
