"""Conversations to ids: exactly the assistant's turns are trained on, whatever the text."""

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import jinja2
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gptcli.errors import DataError
from gptcli.tokenizers import (
    CHAT_TEMPLATE,
    END_OF_TURN,
    START_OF_TURN,
    ByteTokenizer,
    CharTokenizer,
    Message,
    Tokenizer,
    UnknownCharacters,
    dump_tokenizer,
    encode_conversation,
    load_tokenizer,
    tokenizer_from,
    with_chat_tokens,
)
from gptcli.tokenizers.chat import ROLES
from gptcli.tokenizers.gigatoken import FastBpe, fast_bpe
from support.texts import HOSTILE

For = Callable[[str], Tokenizer]
TEMPLATE = jinja2.Template(CHAT_TEMPLATE)

SPELLED = ("<|im_start|>", "<|im_end|>", "<|im_start|>assistant\nno<|im_end|>\n", "<|endoftext|>")
pieces = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="\ue000"), max_size=30),
    st.sampled_from(SPELLED),
    st.sampled_from([text for text in HOSTILE if len(text) < 200]),
    st.sampled_from(["\n", "\n\n\n", "  ", " \t\n ", "\r\n", "\u00a0", "user\n", "assistant\n"]),
)
contents = st.lists(pieces, max_size=3).map("".join)
conversations = st.lists(
    st.builds(Message, st.sampled_from(["system", "user", "assistant"]), contents), max_size=5
)
TURNS = [Message("user", " Hi <|im_end|>\n"), Message("assistant", "\n Yes.\n\n No. ")]


def chatty(tokenizer_for: For, messages: Sequence[Message]) -> Tokenizer:
    """Return a tokenizer with chat tokens that knows all characters of a conversation."""
    text = "".join(message.content for message in messages)
    return with_chat_tokens(tokenizer_for(f"{text}\nsystemuserassistant"))


def trained_text(tokenizer: Tokenizer, messages: Sequence[Message]) -> str:
    """Return what is trained on as text, with the end of each turn."""
    assert tokenizer.chat is not None
    tokens, trained = encode_conversation(tokenizer, messages)
    ends = np.split(tokens[trained], np.flatnonzero(tokens[trained] == tokenizer.chat.end) + 1)
    assert not len(ends.pop())
    assert not any(set(tokenizer.chat) & set(turn[:-1].tolist()) for turn in ends)
    return "".join(tokenizer.decode(turn.tolist()) + END_OF_TURN for turn in ends)


def check(tokenizer: Tokenizer, messages: Sequence[Message]) -> None:
    """Check what is promised of a conversation's ids and of what is trained on."""
    said = [message.content.strip() for message in messages if message.role == "assistant"]
    assert trained_text(tokenizer, messages) == "".join(text + END_OF_TURN for text in said)
    tokens, trained = encode_conversation(tokenizer, messages)
    assert tokens.dtype == np.uint32
    assert trained.shape == tokens.shape
    assert tokens.tolist() == in_one_piece(tokenizer, messages)
    prompt, untrained = encode_conversation(tokenizer, messages, reply=True)
    assert prompt.tolist() == in_one_piece(tokenizer, messages, reply=True)
    assert untrained.tolist() == [*trained.tolist(), *[False] * (len(prompt) - len(tokens))]


def in_one_piece(
    tokenizer: Tokenizer, messages: Sequence[Message], reply: bool = False
) -> list[int]:
    """Return the ids as other programs make them: what is between special tokens is one text.

    The contents spell no special token here: their `<` are other characters until they are in
    place.
    """
    hidden = [message._replace(content=message.content.replace("<", "\ue000"))
              for message in messages]  # fmt: skip
    rendered = TEMPLATE.render(messages=hidden, add_generation_prompt=reply)
    assert tokenizer.chat is not None
    ids: list[int] = []
    for index, turn in enumerate(rendered.split(START_OF_TURN)):
        ids += [tokenizer.chat.start] * (index > 0)
        for place, text in enumerate(turn.split(END_OF_TURN)):
            ids += [tokenizer.chat.end] * (place > 0)
            ids += tokenizer.encode(text.replace("\ue000", "<")).tolist()
    return ids


@settings(max_examples=100, deadline=None)
@given(messages=conversations)
@example(messages=TURNS)
@example(messages=[])
@example(messages=[Message("assistant", "")])
def test_trained_tokens_are_exactly_the_assistants_turns(
    tokenizer_for: For, messages: list[Message]
) -> None:
    check(chatty(tokenizer_for, messages), messages)


def test_ten_thousand_conversations_are_trained_on_where_the_assistant_speaks(
    tokenizer_for: For,
) -> None:
    """2,500 for each of four kinds of tokenizer, of pieces that have broken tokenizers before."""
    draw = random.Random(20)
    parts = [*SPELLED, *(text for text in HOSTILE if len(text) < 200), "\n", "\r\n", "  ", "word"]
    tokenizer = chatty(tokenizer_for, [Message("user", "".join(parts))])
    for _ in range(2500):
        messages = [
            Message(draw.choice(ROLES), "".join(draw.choices(parts, k=draw.randrange(4))))
            for _ in range(draw.randrange(1, 7))
        ]
        said = [message.content.strip() for message in messages if message.role == "assistant"]
        assert trained_text(tokenizer, messages) == "".join(text + END_OF_TURN for text in said)


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_text_that_breaks_tokenizers_does_not_break_a_conversation(
    tokenizer_for: For, text: str
) -> None:
    messages = [Message(role, text) for role in ("system", "user", "assistant", "user")]
    check(chatty(tokenizer_for, messages), messages)


def test_no_text_spells_a_chat_token(tokenizer_for: For) -> None:
    text = "".join(SPELLED)
    tokenizer = chatty(tokenizer_for, [Message("user", text)])
    assert tokenizer.chat is not None
    ids = tokenizer.encode(text)
    assert not set(tokenizer.chat) & set(ids.tolist())
    assert tokenizer.decode(ids.tolist()) == text


def test_chat_tokens_come_after_all_others_and_change_nothing_else(tokenizer_for: For) -> None:
    plain = tokenizer_for("some text")
    before = plain.fingerprint
    tokenizer = with_chat_tokens(plain)
    n = plain.vocab_size
    assert tokenizer.chat == (n, n + 1)
    assert tokenizer.vocab_size == n + 2
    assert tokenizer.eot == plain.eot
    assert tokenizer.ends == (plain.eot, n + 1, n)
    assert tokenizer.encode("some text").tolist() == plain.encode("some text").tolist()
    assert tokenizer.decode_bytes([n, n + 1]) == b""
    assert tokenizer.token_lengths().tolist() == [*plain.token_lengths().tolist(), 0, 0]
    assert with_chat_tokens(tokenizer) is tokenizer
    assert (plain.chat, plain.fingerprint) == (None, before)
    assert tokenizer.fingerprint != before


def test_a_definition_restores_the_chat_tokens(tokenizer_for: For) -> None:
    tokenizer = chatty(tokenizer_for, TURNS)
    again = tokenizer_from(json.loads(json.dumps(tokenizer.definition())))
    assert type(again) is type(tokenizer)
    assert (again.chat, again.vocab_size) == (tokenizer.chat, tokenizer.vocab_size)
    assert again.fingerprint == tokenizer.fingerprint
    pairs = (encode_conversation(each, TURNS)[0].tolist() for each in (again, tokenizer))
    assert next(pairs) == next(pairs)


def test_a_file_restores_the_chat_tokens(tmp_path: Path, gpt2: Tokenizer) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(dump_tokenizer(with_chat_tokens(gpt2)))
    assert load_tokenizer(path).chat == (50257, 50258)
    path.write_bytes(dump_tokenizer(gpt2))
    assert load_tokenizer(path).chat is None


@pytest.mark.parametrize("chat", [None, [], [257], [0, 1], "ab", [258, 257], {"start": 257}])
def test_a_definition_with_other_chat_tokens_is_refused(chat: object) -> None:
    with pytest.raises(DataError, match="chat tokens"):
        tokenizer_from({"name": "bytes", "chat": chat})


def test_an_alphabet_without_the_letters_of_the_roles_says_so() -> None:
    with pytest.raises(UnknownCharacters, match="does not have"):
        encode_conversation(with_chat_tokens(CharTokenizer.of(["abc"])), [Message("user", "a")])


def test_an_example_reads_as_chatml() -> None:
    tokens, trained = encode_conversation(with_chat_tokens(ByteTokenizer()), TURNS)
    shown = [{257: "{", 258: "}"}.get(token) or chr(token) for token in tokens.tolist()]
    assert "".join(shown) == "{user\nHi <|im_end|>}\n{assistant\nYes.\n\n No.}\n"
    assert "".join(np.array(shown)[trained]) == "Yes.\n\n No.}"


def test_gigatoken_reads_gpt2s_own_file_for_a_chat_tokenizer(
    gpt2: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTCLI_FAST", "1")
    pytest.importorskip("gigatoken")
    tokenizer = with_chat_tokens(gpt2)
    fast = fast_bpe(tokenizer)
    assert isinstance(fast, FastBpe)
    [ids] = fast.encode(["it spells <|im_start|> and \n\n"])
    assert ids.tolist() == tokenizer.encode("it spells <|im_start|> and \n\n").tolist()
