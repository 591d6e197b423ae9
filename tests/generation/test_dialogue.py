"""The prompt that a conversation becomes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcli.errors import ConfigError
from gptcli.generation.text import chat_prompt, require_chat
from gptcli.tokenizers import (
    ByteTokenizer,
    CharTokenizer,
    Message,
    encode_conversation,
    with_chat_tokens,
)

BYTES = with_chat_tokens(ByteTokenizer())
HELLO = [Message("system", "Be brief."), Message("user", "Hello"), Message("assistant", "Hi"),
         Message("user", "How are you?")]  # fmt: skip


def encoded(messages: list[Message]) -> list[int]:
    """Return what training sees of messages, and the beginning of an answer."""
    ids: list[int] = encode_conversation(BYTES, messages, reply=True)[0].tolist()
    return ids


def test_what_fits_is_what_training_sees_and_the_beginning_of_an_answer() -> None:
    prompt = chat_prompt(BYTES, HELLO, 1000, 100)
    assert prompt == (encoded(HELLO), 0, 100)
    assert chat_prompt(BYTES, HELLO[1:2], 1000, 100).ids == encoded(HELLO[1:2])


def test_the_oldest_turns_are_left_out_and_never_the_system_prompt() -> None:
    kept = [HELLO[0], HELLO[3]]
    prompt = chat_prompt(BYTES, HELLO, len(encoded(HELLO)) + 9, 10)
    assert prompt == (encoded(kept), 2, 10)
    assert chat_prompt(BYTES, HELLO, len(encoded(HELLO)) + 10, 10).n_dropped == 0


def test_a_long_last_turn_leaves_less_room_and_a_longer_one_is_refused() -> None:
    long = [HELLO[0], Message("user", "x" * 40)]
    n = len(encoded(long))
    assert chat_prompt(BYTES, [*HELLO[:3], long[1]], n + 1, 100) == (encoded(long), 2, 1)
    with pytest.raises(ConfigError, match=f"take {n} tokens, the model's context holds {n}$"):
        chat_prompt(BYTES, [*HELLO[:3], long[1]], n, 100)


TURN = st.tuples(st.text(max_size=12), st.text(max_size=12))


@given(st.lists(TURN, max_size=6), st.text(max_size=12), st.booleans(), st.integers(80, 300))
def test_a_prompt_is_the_latest_whole_turns_that_leave_room_for_an_answer(
    turns: list[tuple[str, str]], last: str, has_system: bool, block_size: int
) -> None:
    system = [Message("system", "Be kind.")] * has_system
    pairs = [[Message("user", one), Message("assistant", two)] for one, two in turns]
    pairs.append([Message("user", last)])
    candidates = [
        (2 * first, encoded(system + [m for pair in pairs[first:] for m in pair]))
        for first in range(len(pairs))
    ]
    messages = system + [message for pair in pairs for message in pair]
    try:
        prompt = chat_prompt(BYTES, messages, block_size, 50)
    except ConfigError:
        assert len(candidates[-1][1]) >= block_size
        return
    fitting = [one for one in candidates if len(one[1]) <= block_size - min(50, block_size // 2)]
    n_dropped, ids = fitting[0] if fitting else candidates[-1]
    assert prompt == (ids, n_dropped, min(50, block_size - len(ids))) and prompt.room > 0


def test_a_character_that_the_vocabulary_lacks_is_named() -> None:
    tokenizer = with_chat_tokens(CharTokenizer("".join(sorted(set("system user assistant\n")))))
    with pytest.raises(ConfigError, match=r"the message: .*'z'"):
        chat_prompt(tokenizer, [Message("user", "z")], 100, 10)


def test_a_base_model_is_refused_with_how_to_make_another() -> None:
    require_chat(BYTES, "runs/x/best.pt")
    with pytest.raises(ConfigError, match=r"runs/x/best\.pt is a base model") as caught:
        require_chat(ByteTokenizer(), "runs/x/best.pt")
    assert "model.init_from=" in str(caught.value.hint)
