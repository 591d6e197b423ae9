"""RANK, WORLD_SIZE and the rest: contradictions are refused, by train alone."""

from typing import Any

import pytest

from gptcli.distributed.environment import Place, place
from gptcli.errors import ConfigError

WRONG = {
    "WORLD_SIZE=abc": "WORLD_SIZE=abc: expected an integer",
    "WORLD_SIZE=0": "WORLD_SIZE=0: expected an integer",
    "WORLD_SIZE=2": "WORLD_SIZE is 2, but RANK is not set",
    "RANK=1": "RANK=1: WORLD_SIZE is not set",
    "RANK=-1": "RANK=-1: WORLD_SIZE is not set",
    "LOCAL_RANK=1": "LOCAL_RANK=1: WORLD_SIZE is not set",
    "RANK=2 WORLD_SIZE=2": "RANK=2: expected an integer from 0 to 1",
    "RANK=1 WORLD_SIZE=2 LOCAL_RANK=x": "LOCAL_RANK=x: expected an integer from 0 to 1",
    "RANK=1 WORLD_SIZE=2": "WORLD_SIZE is 2, but MASTER_ADDR is not set",
    "RANK=1 WORLD_SIZE=2 MASTER_ADDR=localhost": "but MASTER_PORT is not set",
    "RANK=1 WORLD_SIZE=2 MASTER_ADDR=localhost MASTER_PORT=x": "MASTER_PORT=x: expected",
}


def surround(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for word in words.split():
        monkeypatch.setenv(*word.split("="))


@pytest.mark.parametrize("words", WRONG)
def test_what_contradicts_itself_is_refused(
    words: str, monkeypatch: pytest.MonkeyPatch, gpt: Any
) -> None:
    surround(monkeypatch, words)
    done = gpt("train", "-s", "data.dir=none")
    assert done.code == 2 and WRONG[words] in done.err and len(done.err_lines) == 2
    assert gpt("runs", "list").code == 0
    assert gpt("config", "show", "--json").code == gpt("config", "show").code
    assert gpt("prepare", "none.txt").err.startswith("error: none.txt")


def test_what_says_one_process_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for words in ("", "WORLD_SIZE=1", "RANK=0", "RANK=0 LOCAL_RANK=0 WORLD_SIZE=1", "RANK= "):
        surround(monkeypatch, words)
        assert place() == Place(0, 0, 1)
    surround(monkeypatch, "RANK=5 LOCAL_RANK=1 WORLD_SIZE=8 MASTER_ADDR=a MASTER_PORT=29500")
    assert place() == Place(5, 1, 8)


def test_a_number_of_many_digits_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    surround(monkeypatch, "WORLD_SIZE=" + "9" * 5000)
    with pytest.raises(ConfigError, match="WORLD_SIZE"):
        place()
