"""Encode prompts and conversations, and decode sampled ids into complete UTF-8 text."""

import codecs
import contextlib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gptcli.config.schema import GenerateConfig
from gptcli.errors import ConfigError
from gptcli.generation.decode import Drawn, Row
from gptcli.tokenizers import Message, Tokenizer, UnknownCharacters, encode_conversation


@contextlib.contextmanager
def _spelled(what: str) -> Iterator[None]:
    """Turn a character that the vocabulary lacks into a ConfigError."""
    try:
        yield
    except UnknownCharacters as error:
        raise ConfigError(f"{what}: {error.message}", error.hint) from error


def encode_prompt(tokenizer: Tokenizer, prompt: str | None, block_size: int) -> list[int]:
    """Return the ids to start from: the prompt's, or without one what a text starts with.

    Raises:
        ConfigError: The prompt is longer than the context, or the vocabulary lacks part of it.
    """
    with _spelled("the prompt"):
        ids = [*tokenizer.start, *(tokenizer.encode(prompt).tolist() if prompt else ())]
    ids = ids or [tokenizer.eot]
    if len(ids) > block_size:
        raise ConfigError(
            f"the prompt has {len(ids)} tokens, the model's context holds {block_size}",
            "shorten the prompt to its end, which matters most",
        )
    return ids


def extend_context(
    tokenizer: Tokenizer, history: Sequence[int], text: str, block_size: int
) -> list[int]:
    """Return the ids of a conversation and of `text`; their later part if the context is too short.

    Raises:
        ConfigError: The vocabulary lacks part of the text.
    """
    with _spelled("the prompt"):
        ids = [*(history or tokenizer.start), *tokenizer.encode(text).tolist()] or [tokenizer.eot]
    return ids if len(ids) < block_size else ids[-max(1, block_size // 2) :]


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
    with _spelled("the message"):
        pieces = [encode_conversation(tokenizer, [message])[0] for message in messages]
    pieces.append(encode_conversation(tokenizer, [], reply=True)[0])
    n_head = int(bool(messages) and messages[0].role == "system")
    turns = [i for i, message in enumerate(messages) if i >= n_head and message.role == "user"]
    limit = block_size - min(max_new_tokens, block_size // 2)
    for first in turns or [n_head]:
        ids: list[int] = np.concatenate((*pieces[:n_head], *pieces[first:])).tolist()
        if len(ids) <= limit:
            break
    if len(ids) >= block_size:
        what = "the message and the system prompt take" if n_head else "the message takes"
        raise ConfigError(
            f"{what} {len(ids)} tokens, the model's context holds {block_size}", "shorten the text"
        )
    return ChatPrompt(ids, first - n_head, min(max_new_tokens, block_size - len(ids)))


def sample_start(tokenizer: Tokenizer, config: GenerateConfig, block_size: int) -> list[int]:
    """Return the ids that a run samples from: the prompt's, a message where there are chat tokens.

    Raises:
        ConfigError: As `encode_prompt` or `chat_prompt` does.
    """
    if tokenizer.chat is None:
        return encode_prompt(tokenizer, config.prompt, block_size)
    asked = [Message("user", config.prompt)] if config.prompt else []
    return chat_prompt(tokenizer, asked, block_size, config.max_new_tokens).ids


class TextStream:
    """The text of sampled ids, cut before the first stop string.

    Bytes of an unfinished character and what may become a stop string are held back until it is
    certain what they are.

    Attributes:
        text: The text that is certain.
        n_tokens: Ids received so far.
        is_stopped: Whether a stop string was met.
    """

    def __init__(self, tokenizer: Tokenizer, config: GenerateConfig) -> None:
        self.text = self._held = ""
        self.n_tokens = 0
        self.is_stopped = False
        self._tokenizer, self._stops = tokenizer, config.stop
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def n_characters(self) -> int:
        """Characters received, certain or not."""
        return len(self.text) + len(self._held)

    def push(self, token: int) -> str:
        """Take the next id; return the text that became certain, perhaps none."""
        self.n_tokens += 1
        self._held += self._utf8.decode(self._tokenizer.token_bytes(token))
        stops = self._stops
        if places := [at for stop in stops if (at := self._held.find(stop)) >= 0]:
            self.is_stopped = True
            return self._release(min(places))
        begun = (n for stop in stops for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
        return self._release(len(self._held) - max(begun, default=0))

    def finish(self) -> str:
        """Return what was held back, once no more ids come."""
        if self.is_stopped:
            return ""
        self._held += self._utf8.decode(b"", final=True)
        return self._release(len(self._held))

    def _release(self, n: int) -> str:
        certain, self._held = self._held[:n], self._held[n:]
        self.text += certain
        return certain


class Token(NamedTuple):
    """A token of a text: where in it, and the likeliest ones (id, log-probability) in its place."""

    id: int
    offset: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Piece:
    """What a text grew by; `finish_reason` comes with its last piece."""

    index: int
    text: str
    tokens: list[Token]
    finish_reason: str | None


class Sample:
    """A text that grows, and how much of it was taken.

    Attributes:
        index: Its place among those that are asked for.
        row: What its draws depend on; `row.tokens` are the prompt's and its own.
        text: What its tokens spell.
        tokens: Its own, with log-probabilities; none if the row asks for none.
        finish_reason: "stop", after end-of-text or a stop string, or "length"; None while it grows.
        is_ended: Whether end-of-text was met.
        began: When a server drew its first token, by time.monotonic.
    """

    def __init__(self, index: int, row: Row, tokenizer: Tokenizer) -> None:
        self.index, self.row, self.text = index, row, TextStream(tokenizer, row.config)
        self.tokens = list[Token]()
        self.finish_reason: str | None = None
        self.is_ended = False
        self.began = 0.0
        self._n_characters = self._n_tokens = 0  # taken
        self._is_taken = False  # to the end

    def push(self, drawn: Drawn) -> bool:
        """Take a draw; return whether the text is complete."""
        if drawn.token is not None:
            if self.row.n_top is not None:
                offset = self.text.n_characters
                self.tokens.append(Token(drawn.token, offset, drawn.logprob, drawn.top))
            self.text.push(drawn.token)
        else:
            self.is_ended = True
        if self.text.is_stopped or self.is_ended:
            self.finish("stop")
        elif self.row.n_drawn == self.row.config.max_new_tokens:
            self.finish("length")
        return self.finish_reason is not None

    def finish(self, reason: str) -> None:
        """End the text."""
        self.text.finish()
        self.finish_reason = reason

    def take(self) -> Piece | None:
        """Return what is new and certain, or None."""
        text, tokens = self.text.text[self._n_characters :], self.tokens[self._n_tokens :]
        self._n_characters += len(text)
        is_done = self.finish_reason is not None
        if self.text.is_stopped or not is_done:  # later tokens have no text, or none yet
            tokens = [token for token in tokens if token.offset < self._n_characters]
        self._n_tokens += len(tokens)
        if self._is_taken or not (text or tokens or is_done):
            return None
        self._is_taken = is_done
        return Piece(self.index, text, tokens, self.finish_reason)
