"""A conversation: what belongs to it, and when answers end."""

import contextlib
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from gptcli.api.generate import Chat, Sampler
from gptcli.config import load_config
from gptcli.errors import ConfigError
from gptcli.tokenizers import Message, encode_conversation
from support.chat import BYTES, END, END_OF_TEXT, START, parrot


def opened(path: Path, system: str | None = None, **settings: Any) -> Chat:
    """Open a conversation."""
    flags = {"device": "cpu", "dtype": "float32"}
    flags |= {f"generate.{key}": value for key, value in settings.items()}
    return Chat(
        Sampler(str(path), lambda run: load_config(None, (), flags, run), chat=True), system
    )


@pytest.mark.parametrize("end", [END, END_OF_TEXT, START])
def test_an_answer_ends_at_the_end_of_its_turn(end: int) -> None:
    chat = opened(parrot("Hey!", end))
    assert "".join(chat.ask("Hello")) == "Hey!"
    assert chat.messages == [Message("user", "Hello"), Message("assistant", "Hey!")]
    assert chat.last is not None and chat.last.finish_reason == "stop"


def test_an_answer_is_drawn_from_all_that_was_said() -> None:
    chat = opened(parrot("Hey!", block_size=256), "Be kind.")
    "".join(chat.ask("Hello"))
    "".join(chat.ask("Again"))
    assert chat.prompt is not None
    said = [Message("system", "Be kind."), Message("user", "Hello"), Message("assistant", "Hey!"),
            Message("user", "Again")]  # fmt: skip
    assert chat.prompt.ids == encode_conversation(BYTES, said, reply=True)[0].tolist()
    assert chat.messages == [*said, Message("assistant", "Hey!")]


def test_an_answer_never_leaves_the_context() -> None:
    chat = opened(parrot([97, 98], then=97, block_size=40), max_new_tokens=100)
    text = "".join(chat.ask("Hello"))
    assert chat.prompt is not None and chat.last is not None
    assert len(text) == chat.prompt.room == 40 - len(chat.prompt.ids)
    assert chat.last.finish_reason == "length"
    "".join(chat.ask("Hi"))
    assert chat.prompt.n_dropped == 2 and len(chat.messages) == 4


def test_what_was_said_of_a_stopped_answer_stays_and_nothing_of_none() -> None:
    chat = opened(parrot([97, 98], then=97))
    with contextlib.closing(chat.ask("Hello")) as pieces:
        assert list(islice(pieces, 3)) == ["a", "b", "a"]
    assert chat.messages[-1] == Message("assistant", "aba")
    silent = opened(parrot("", name="silent"))
    assert "".join(silent.ask("Hello")) == "" and silent.messages == []


def test_undo_takes_back_a_turn_and_reset_all() -> None:
    chat = opened(parrot("Hey!", block_size=256), "Be kind.")
    for text in ("one", "two"):
        "".join(chat.ask(text))
    assert chat.undo() and [m.content for m in chat.messages] == ["Be kind.", "one", "Hey!"]
    assert chat.undo() and not chat.undo() and len(chat.messages) == 1
    "".join(chat.ask("three"))
    chat.reset()
    assert chat.messages == [Message("system", "Be kind.")]


def test_a_message_that_does_not_fit_changes_nothing() -> None:
    chat = opened(parrot("Hey!"))
    with pytest.raises(ConfigError, match="context holds 64"):
        list(chat.ask("x" * 64))
    assert chat.messages == [] and "".join(chat.ask("Hello")) == "Hey!"


def test_the_same_seed_gives_the_same_answers_and_asking_again_another() -> None:
    path = parrot("Hey!", block_size=256)

    def answers() -> list[str]:
        chat = opened(path, temperature=50.0, max_new_tokens=8)
        first = "".join(chat.ask("Hello"))
        chat.undo()
        return [first, "".join(chat.ask("Hello"))]

    first, again = answers()
    assert [first, again] == answers() and first != again
