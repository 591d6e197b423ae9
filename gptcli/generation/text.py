"""Encode prompts, and decode sampled ids into complete UTF-8 text."""

import codecs
from collections.abc import Sequence

from gptcli.config.schema import GenerateConfig
from gptcli.errors import ConfigError
from gptcli.tokenizers import (
    Message,
    Tokenizer,
    UnknownCharacters,
    encode_conversation,
)


def encode_prompt(
    tokenizer: Tokenizer, prompt: str | None, block_size: int, *, as_message: bool = False
) -> list[int]:
    """Return the ids to start from: the prompt's, or without one what a text starts with.

    As a message, the prompt is a user's, and the ids end where an answer begins.

    Raises:
        ConfigError: The prompt is longer than the context, or the vocabulary lacks part of it.
    """
    if as_message:
        ids = _encode(tokenizer, [Message("user", prompt)] if prompt else [])
    else:
        ids = [*tokenizer.start, *(_encode(tokenizer, prompt) if prompt else ())]
    ids = ids or [tokenizer.eot]
    if len(ids) > block_size:
        raise ConfigError(
            f"the prompt has {len(ids)} tokens, the model's context holds {block_size}",
            "shorten the prompt to its end, which matters most",
        )
    return ids


def _encode(tokenizer: Tokenizer, prompt: str | list[Message]) -> list[int]:
    try:
        if isinstance(prompt, str):
            ids = tokenizer.encode(prompt)
        else:
            ids, _ = encode_conversation(tokenizer, prompt, reply=True)
    except UnknownCharacters as error:
        raise ConfigError(f"the prompt: {error.message}", error.hint) from error
    listed: list[int] = ids.tolist()
    return listed


def extend_context(
    tokenizer: Tokenizer, history: Sequence[int], text: str, block_size: int
) -> list[int]:
    """Return the ids of a conversation and of `text`; their later part if the context is too short.

    Raises:
        ConfigError: The vocabulary lacks part of the text.
    """
    ids = [*(history or tokenizer.start), *_encode(tokenizer, text)] or [tokenizer.eot]
    return ids if len(ids) < block_size else ids[-max(1, block_size // 2) :]


class TextStream:
    """The text of sampled ids, cut before the first stop string.

    Bytes of an unfinished character and what may become a stop string are held back until it is
    certain what they are.

    Attributes:
        text: The text that is certain.
        n_tokens: Ids received so far.
        is_stopped: Whether a stop string was met.
        is_ended: Whether end-of-text was: set by `finish` if there are fewer ids than asked for.
    """

    def __init__(self, tokenizer: Tokenizer, config: GenerateConfig) -> None:
        self.text = ""
        self.n_tokens = 0
        self.is_stopped = self.is_ended = False
        self._held = ""
        self._tokenizer, self._config = tokenizer, config
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def n_characters(self) -> int:
        """Characters received, certain or not."""
        return len(self.text) + len(self._held)

    @property
    def finish_reason(self) -> str:
        """Why it ended: "length", or "stop" after end-of-text or a stop string."""
        return "stop" if self.is_stopped or self.is_ended else "length"

    def push(self, token: int) -> str:
        """Take the next id; return the text that became certain, perhaps none."""
        self.n_tokens += 1
        self._held += self._utf8.decode(self._tokenizer.token_bytes(token))
        stops = self._config.stop
        if places := [at for stop in stops if (at := self._held.find(stop)) >= 0]:
            self.is_stopped = True
            return self._release(min(places))
        begun = (n for stop in stops for n in range(1, len(stop)) if self._held.endswith(stop[:n]))
        return self._release(len(self._held) - max(begun, default=0))

    def finish(self) -> str:
        """Return what was held back, once no more ids come."""
        if self.is_stopped:
            return ""
        self.is_ended = self.n_tokens < self._config.max_new_tokens
        self._held += self._utf8.decode(b"", final=True)
        return self._release(len(self._held))

    def _release(self, n: int) -> str:
        certain, self._held = self._held[:n], self._held[n:]
        self.text += certain
        return certain
