"""Text around tokens: prompts, whole characters, stop strings."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcli.config import GenerateConfig, TokenizerConfig
from gptcli.errors import ConfigError
from gptcli.generation.decode import Drawn, Row
from gptcli.generation.text import Sample, TextStream, chat_prompt, encode_prompt, extend_context
from gptcli.tokenizers import (
    Message,
    Tokenizer,
    encode_conversation,
    make_tokenizer,
    with_chat_tokens,
)


def byte_tokenizer() -> Tokenizer:
    """Return the tokenizer that needs no text."""
    return make_tokenizer(TokenizerConfig(name="bytes"), lambda: [])


def test_a_prompt_longer_than_the_context_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the prompt has 17 tokens, .* holds 16"):
        encode_prompt(byte_tokenizer(), "x" * 17, 16)
    assert encode_prompt(byte_tokenizer(), None, 16) == [256]
    assert encode_prompt(byte_tokenizer(), "", 16) == [256]


def test_a_prompt_may_be_a_message_to_answer() -> None:
    chat = with_chat_tokens(byte_tokenizer())
    asked, _ = encode_conversation(chat, [Message("user", "Hi")], reply=True)
    assert chat_prompt(chat, [Message("user", "Hi")], 64, 8).ids == asked.tolist()
    assert chat_prompt(chat, [], 64, 8).ids == [257, *b"assistant\n"]
    assert encode_prompt(chat, "Hi", 64) == [*b"Hi"]
    with pytest.raises(ConfigError, match=r"the message takes 21 tokens"):
        chat_prompt(chat, [Message("user", "Hi")], 16, 8)


def texts(ids: bytes, stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    """Return the pieces that a stream of bytes gives, and the text after it ended."""
    found = TextStream(byte_tokenizer(), GenerateConfig(stop=list(stop)))
    pieces = []
    for token in ids:
        pieces.append(found.push(token))
        if found.is_stopped:
            break
    return [*pieces, found.finish()], found


def test_characters_come_whole() -> None:
    pieces, found = texts("a😀é".encode())
    assert pieces == ["a", "", "", "", "😀", "", "é", ""]
    assert found.text == "a😀é" and found.n_tokens == 7


def test_an_unfinished_character_becomes_a_replacement() -> None:
    assert texts("a😀".encode()[:-1])[1].text == "a\ufffd"


@pytest.mark.parametrize(
    ("drawn", "stop", "reason", "is_ended"),
    [
        ([97, 98, 99], [], "length", False),
        ([97, None], [], "stop", True),
        ([97, 98], ["b"], "stop", False),
        ([97, 98, 99], ["c"], "stop", False),
        ([97, 98], [], None, False),
    ],
)
def test_why_a_text_ends(
    drawn: list[int | None], stop: list[str], reason: str | None, is_ended: bool
) -> None:
    row = Row([0], GenerateConfig(max_new_tokens=3, stop=stop), (), seed=1)
    sample = Sample(0, row, byte_tokenizer())
    for n_drawn, token in enumerate(drawn, 1):
        row.n_drawn = n_drawn
        is_done = sample.push(Drawn(row, token, 0.0, []))
        assert is_done == (reason is not None and n_drawn == len(drawn))
    assert (sample.finish_reason, sample.is_ended) == (reason, is_ended)


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        (b"one END two", ("END",), "one "),
        (b"one EN END", ("END",), "one EN "),
        (b"EEND", ("END",), "E"),
        (b"abcd", ("cd", "bc"), "a"),
        (b"aaab", ("aab",), "a"),
        (b"no stop here", ("xyz",), "no stop here"),
        (b"ends with EN", ("END",), "ends with EN"),
        ("caf\u00e9!".encode(), ("\u00e9",), "caf"),
    ],
)
def test_text_ends_before_the_first_stop_string(
    text: bytes, stop: tuple[str, ...], expected: str
) -> None:
    pieces, found = texts(text, stop=stop)
    assert found.text == "".join(pieces) == expected


@given(
    st.text(alphabet="ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3)
)
def test_stop_strings_cut_where_searching_the_whole_text_would(text: str, stop: list[str]) -> None:
    _, found = texts(text.encode(), stop=tuple(stop))
    # The stream stops at the first moment any stop string is complete.
    ends = [(end, start) for end in range(1, len(text) + 1) for s in stop
            if (start := end - len(s)) >= 0 and text[start:end] == s]  # fmt: skip
    first = min((end for end, _ in ends), default=None)
    cut = min(start for end, start in ends if end == first) if first is not None else len(text)
    assert found.text == text[:cut]


def test_half_a_surrogate_pair_is_no_prompt() -> None:
    for text in ("caf\udce9", "x" * 20 + "\udce9"):
        with pytest.raises(ConfigError, match="surrogate"):
            extend_context(byte_tokenizer(), [], text, 16)


def test_what_was_said_is_continued_and_shortened_from_its_beginning() -> None:
    tokenizer = byte_tokenizer()
    assert extend_context(tokenizer, [], "", 16) == [256]
    assert extend_context(tokenizer, [1, 2], "ab", 16) == [1, 2, 97, 98]
    assert extend_context(tokenizer, [1, 2], "", 16) == [1, 2]
    assert extend_context(tokenizer, list(range(14)), "ab", 16) == [*range(8, 14), 97, 98]
    assert extend_context(tokenizer, [], "x" * 50, 16) == [120] * 8
