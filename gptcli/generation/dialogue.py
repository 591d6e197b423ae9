"""Conversations: the prompt that messages become, by whole turns within the context."""

import shlex
from collections.abc import Sequence
from typing import NamedTuple

from gptcli.errors import ConfigError
from gptcli.tokenizers import Message, Tokenizer, UnknownCharacters, encode_conversation


class ChatPrompt(NamedTuple):
    """What an answer is sampled from.

    Attributes:
        ids: The messages that fit, and the beginning of an answer.
        n_dropped: How many of the oldest messages did not fit.
        room: The most tokens that an answer can have.
    """

    ids: list[int]
    n_dropped: int
    room: int


def require_chat(tokenizer: Tokenizer, name: str) -> None:
    """Refuse a model that has not learned where a message begins and ends.

    Raises:
        ConfigError: With how to make one that has.
    """
    if tokenizer.chat is None:
        raise ConfigError(
            f"{name} is a base model: it continues text and has no chat tokens",
            "train it on conversations: `gpt train -s data.source=chat.jsonl"
            f" -s model.init_from={shlex.quote(name)}`; to continue text: `gpt generate`",
        )


def chat_prompt(
    tokenizer: Tokenizer, messages: Sequence[Message], block_size: int, max_new_tokens: int
) -> ChatPrompt:
    """Return the prompt for the next answer in a conversation.

    If the conversation does not fit, its oldest turns are left out, each a message of the user and
    what follows it. The system prompt and the last turn always stay. An answer has room for
    `max_new_tokens`, or half of the context if that is less; for a long last turn it is shorter.

    Raises:
        ConfigError: The last turn does not fit, or the vocabulary lacks part of a message.
    """
    try:
        pieces = [_ids(tokenizer, [message]) for message in messages]
    except UnknownCharacters as error:
        raise ConfigError(f"the message: {error.message}", error.hint) from error
    opening = _ids(tokenizer, [], reply=True)
    n_head = int(bool(messages) and messages[0].role == "system")
    turns = [i for i, message in enumerate(messages) if i >= n_head and message.role == "user"]
    limit = block_size - min(max_new_tokens, block_size // 2)
    for first in turns or [n_head]:
        ids = [id for piece in (*pieces[:n_head], *pieces[first:], opening) for id in piece]
        if len(ids) <= limit:
            break
    if len(ids) >= block_size:
        what = "the message and the system prompt take" if n_head else "the message takes"
        raise ConfigError(
            f"{what} {len(ids)} tokens, the model's context holds {block_size}", "shorten the text"
        )
    return ChatPrompt(ids, first - n_head, min(max_new_tokens, block_size - len(ids)))


def _ids(tokenizer: Tokenizer, messages: Sequence[Message], *, reply: bool = False) -> list[int]:
    ids: list[int] = encode_conversation(tokenizer, messages, reply=reply)[0].tolist()
    return ids
