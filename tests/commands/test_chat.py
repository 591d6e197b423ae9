"""`gpt chat` end to end."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gptcli.api.generate import Chat, Sampler
from gptcli.commands.chat import converse
from gptcli.config import load_config
from support.chat import parrot

HEY = {"answer": "Hey!", "tokens": 4, "finish_reason": "stop"}


def test_a_message_is_answered_once_from_an_argument_or_stdin(gpt: Any) -> None:
    parrot("Hey!")
    for done in (gpt("chat", "Hello"), gpt("chat", stdin=b"Hello\nyou\n")):
        assert done.code == 0 and done.out == "Hey!\n", done.err
    for words, stdin in ((["Hello"], b""), ([], b"Hello\n")):
        found = gpt("chat", "--json", *words, stdin=stdin).json
        assert list(found) == ["answer", "tokens", "prompt_tokens", "finish_reason", "seed",
                               "tokens_per_second", "seconds_to_first_token"]  # fmt: skip
        assert found | HEY == found
        assert found["prompt_tokens"] == len("user\nHello\nassistant\n") + 3


def test_options_reach_the_answer(gpt: Any) -> None:
    parrot("Hey!")
    told = gpt("chat", "Hello", "--json", "--system", "Be kind.", "--max-new-tokens", "2").json
    assert told["answer"] == "He" and told["finish_reason"] == "length"
    assert told["prompt_tokens"] == len("system\nBe kind.\nuser\nHello\nassistant\n") + 5
    assert gpt("chat", "Hello", "--stop", "y").out == "He\n"
    cut = gpt("chat", "Hello", "-s", "generate.max_new_tokens=2")
    assert cut.out == "He\n" and "stopped after 2 tokens; --max-new-tokens" in cut.err
    full = gpt("chat", "x" * 43)
    assert full.out == "He\n" and "stopped after 2 tokens, where the context is full" in full.err


@pytest.mark.parametrize(
    ("words", "stdin", "message"),
    [
        ((), b"", "no message to answer"),
        ((" ",), b"", "no message to answer"),
        ((), b"caf\xe9", "the message on stdin is not UTF-8 at byte 3"),
        (("x" * 64,), b"", "the message takes 83 tokens, the model's context holds 64"),
        (("Hello", "--temperature", "-1"), b"", "temperature"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    gpt: Any, words: tuple[str, ...], stdin: bytes, message: str
) -> None:
    parrot("Hey!")
    for done in (gpt("chat", *words, stdin=stdin), gpt("chat", "--json", *words, stdin=stdin)):
        assert done.code == 2 and message in done.err, done.err
    assert done.json["exit_code"] == 2 and message in done.json["error"]


def test_a_base_model_is_refused(gpt: Any, run: Path) -> None:
    done = gpt("chat", "Hello")
    assert done.code == 2 and done.out == "" and len(done.err_lines) <= 3
    assert "best.pt is a base model" in done.err and "model.init_from=" in done.err


def test_generate_continues_a_text_also_with_a_model_that_chats(gpt: Any) -> None:
    parrot("Hey!")
    done = gpt("generate", "He")
    assert done.out == "y!\n" and "`gpt chat`" in done.err


def test_control_characters_are_removed_unless_raw(gpt: Any) -> None:
    parrot("a\x1bb")
    assert gpt("chat", "Hello").out == "ab\n"
    assert gpt("chat", "Hello", "--raw").out == "a\x1bb\n"
    assert gpt("chat", "Hello", "--json").json["answer"] == "a\x1bb"


def conversation(path: Path, lines: str, monkeypatch: pytest.MonkeyPatch) -> Chat:
    """Type lines, as if at a terminal; return the conversation."""
    Path("typed").write_text(lines)
    sampler = Sampler(str(path), lambda run: load_config(None, (), {"device": "cpu"}, run))
    chat = Chat(sampler, "Be kind.")
    with Path("typed").open() as typed:
        monkeypatch.setattr("sys.stdin", typed)
        converse(chat, str)
    return chat


def test_commands_of_a_conversation(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["/help", "/undo", "/save", "/save chat.jsonl", "Hello", "/save my chat.jsonl", "",
             "And you?", "/undo", " /undo", "/save my chat.jsonl", "/save typed",
             "/frob"]  # fmt: skip
    chat = conversation(parrot("Hey!", block_size=256), "\n".join(lines), monkeypatch)
    out, err = capsys.readouterr()
    assert out.split() == ["Hey!"] * 3
    for said in ("/reset", "nothing to take back", "needs the name of a file", "nothing to save",
                 "saved 3 messages to my chat.jsonl", "took back", "typed exists; choose another",
                 "saved 5 messages to my chat.jsonl", "/frob is not a command"):  # fmt: skip
        assert said in err, said
    [row] = map(json.loads, Path("my chat.jsonl").read_text().splitlines())
    assert [message["content"] for message in row["messages"]] == [
        "Be kind.", "Hello", "Hey!", " /undo", "Hey!"
    ]  # fmt: skip
    assert not Path("chat.jsonl").exists() and len(chat.messages) == 5


def test_reset_keeps_the_system_prompt(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = conversation(parrot("Hey!"), "Hello\n/reset\n", monkeypatch)
    assert [message.role for message in chat.messages] == ["system"]


def test_what_no_longer_fits_is_said(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = conversation(parrot("Hey!", block_size=128), "one\ntwo\nthree\nfour\n", monkeypatch)
    err = capsys.readouterr().err
    assert "the context is full: the oldest 2 messages are left out" in err
    assert len(chat.messages) == 9


def test_a_message_too_long_ends_no_conversation(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation(parrot("Hey!"), f"{'x' * 99}\nHello\n", monkeypatch)
    out, err = capsys.readouterr()
    assert out.split() == ["Hey!"] and "context holds 64" in err


def test_what_goes_wrong_ends_no_conversation(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "One\n/save ~nobody-of-that-name/chat.jsonl\n/save typed/chat.jsonl\nTwo\n"
    chat = conversation(parrot("Hey!", block_size=256), lines, monkeypatch)
    out, err = capsys.readouterr()
    assert out.split() == ["Hey!"] * 2 and len(chat.messages) == 5
    assert "~nobody-of-that-name" in err and "expected a folder, found a file" in err


def test_a_line_that_is_not_utf8_is_refused_and_the_next_one_answered(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter([b"\xff\n", b"Hello\n", b""])
    stdin = SimpleNamespace(isatty=lambda: False, readline=lambda: next(lines).decode())
    monkeypatch.setattr("sys.stdin", stdin)
    path = str(parrot("Hey!"))
    converse(Chat(Sampler(path, lambda run: load_config(None, (), {"device": "cpu"}, run))), str)
    out, err = capsys.readouterr()
    assert "not UTF-8" in err and out == "Hey!\n"


def test_an_answer_of_white_space_is_no_message(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = conversation(parrot(" \t"), "Hello\n/save chat.jsonl\n", monkeypatch)
    assert [message.role for message in chat.messages] == ["system"]
    assert "nothing to save" in capsys.readouterr().err and not Path("chat.jsonl").exists()


class Typist:
    """A person at a terminal that `gpt chat` runs in."""

    def __init__(self, *words: str) -> None:
        import fcntl
        import termios

        def sit_down() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # in the background it is ignored

        self._end, theirs = os.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gptcli", "chat", *words],
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
            env={**os.environ, "TERM": "xterm", "NO_COLOR": "1"},
            preexec_fn=sit_down,
        )  # fmt: skip
        os.close(theirs)
        self.seen = ""

    def leaves(self) -> None:
        """End the program, if it still runs."""
        self.process.kill()
        self.process.wait()
        os.close(self._end)

    def sees(self, text: str) -> None:
        """Read on until there is `text`, behind what was waited for before."""
        while text not in self.seen:
            assert select.select([self._end], [], [], 100)[0], f"waited for {text!r}: {self.seen!r}"
            try:
                self.seen += os.read(self._end, 1 << 16).decode(errors="replace")
            except OSError:  # Linux: the program has ended
                raise AssertionError(self.seen) from None
        self.seen = self.seen.partition(text)[2]

    def is_asked(self) -> None:
        """Wait for the prompt and for readline: what is typed before is lost."""
        import termios

        self.sees("> ")
        deadline = time.monotonic() + 100
        while termios.tcgetattr(self._end)[3] & termios.ICANON:
            assert time.monotonic() < deadline, self.seen
            time.sleep(0.01)

    def types(self, text: str) -> None:
        """Type."""
        os.write(self._end, text.encode())


@pytest.mark.skipif(os.name == "nt", reason="Windows has other terminals")
def test_ctrl_c_stops_the_answer_and_not_the_conversation(
    request: pytest.FixtureRequest,
) -> None:
    parrot([97, 98], then=97, block_size=8192)
    typist = Typist("--max-new-tokens", "1000000")
    request.addfinalizer(typist.leaves)
    typist.is_asked()
    typist.types("Hello\r")
    typist.sees("abababab")
    typist.types("\x03")
    typist.is_asked()
    typist.types("half a line")
    typist.sees("half a line")
    time.sleep(0.5)  # Python misses a Ctrl-C that comes just before readline waits again
    typist.types("\x03")
    typist.is_asked()
    typist.types("\x1b[200~two\rlines\x1b[201~\r")  # how a terminal sends what is pasted
    typist.sees("abababab")
    typist.types("\x03")
    typist.is_asked()
    typist.types("/save chat.jsonl\r")
    typist.sees("saved 4 messages")
    typist.is_asked()
    typist.types("\x04")
    assert typist.process.wait(300) == 0
    said = [
        message["content"] for message in json.loads(Path("chat.jsonl").read_text())["messages"]
    ]
    assert said[::2] == ["Hello", "two\nlines"]
    assert all(set(answer) == {"a", "b"} and len(answer) < 1000000 for answer in said[1::2])
