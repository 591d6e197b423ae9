"""Conversations to ids: ChatML, with what is trained on.

A message is `<|im_start|>role\n`, its content, `<|im_end|>\n`. Trained on are the assistant's
contents and the `<|im_end|>` after each, so a model learns what to answer and where to stop.

White space around a content is removed, here and in `CHAT_TEMPLATE`, as the templates of several
model families do. A content then begins with what no split joins to the newline before it: the
header and the content have the same ids apart as in one piece, which is how other programs encode
what is between two special tokens. So the ids are theirs, a prompt ends where an answer begins, and
no token is half trained.
"""

import copy
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from gptcli.tokenizers.base import ChatTokens, Ids, Tokenizer

Role = Literal["system", "user", "assistant"]
Mask = npt.NDArray[np.bool_]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")
START_OF_TURN, END_OF_TURN = "<|im_start|>", "<|im_end|>"
ASSISTANT = ROLES.index("assistant")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + (message['content'] | trim)"
    " + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The same as Jinja, for programs that render conversations as text."""

AnyTokenizer = TypeVar("AnyTokenizer", bound=Tokenizer)


class Message(NamedTuple):
    """What one side says."""

    role: Role
    content: str


def with_chat_tokens(tokenizer: AnyTokenizer) -> AnyTokenizer:
    """Return the tokenizer with two ids more: what begins and what ends a turn."""
    if tokenizer.chat is not None:
        return tokenizer
    made, n = copy.copy(tokenizer), tokenizer.vocab_size
    made.chat, made.vocab_size = ChatTokens(n, n + 1), n + 2
    return made


class Layout:
    """Puts encoded contents between the tokens of their turns, many at a time."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Encode what is around a content; UnknownCharacters if no tokens spell the roles."""
        chat = tokenizer.chat
        assert chat is not None
        self.headers = [np.append(np.uint32(chat.start), tokenizer.encode(f"{r}\n")) for r in ROLES]
        self.end = np.append(np.uint32(chat.end), tokenizer.encode("\n"))

    def join(
        self, ids: npt.NDArray[Any], counts: Sequence[int], roles: Sequence[int]
    ) -> tuple[npt.NDArray[Any], Mask, npt.NDArray[np.int64]]:
        """Return tokens (n,), which of them are trained on (n,), and the first of each message.

        Args:
            ids: Those of all contents, in a row.
            counts: The number of ids of each content, (m,).
            roles: An index into `ROLES` for each content, (m,).
        """
        n_ids, role = np.asarray(counts, dtype=np.int64), np.asarray(roles, dtype=np.int64)
        n_header = np.array([len(header) for header in self.headers])[role]
        lengths = n_header + n_ids + len(self.end)
        ends = np.cumsum(lengths)
        starts = ends - lengths
        tokens = np.empty(int(lengths.sum()), dtype=ids.dtype)
        trained = np.zeros(len(tokens), dtype=np.bool_)
        shift = starts + n_header - (np.cumsum(n_ids) - n_ids)
        places = np.arange(len(ids)) + np.repeat(shift, n_ids)
        tokens[places] = ids
        trained[places] = np.repeat(role == ASSISTANT, n_ids)
        for index, header in enumerate(self.headers):
            tokens[starts[role == index, None] + np.arange(len(header))] = header
        after = (ends - len(self.end))[:, None] + np.arange(len(self.end))
        tokens[after] = self.end
        trained[after[:, 0]] = role == ASSISTANT
        return tokens, trained, starts


def encode_conversation(
    tokenizer: Tokenizer, messages: Sequence[Message], *, reply: bool = False
) -> tuple[Ids, Mask]:
    """Return the ids (n,) of a conversation and which of them are trained on (n,).

    With `reply` the header of an answer comes last, to sample it from. Text that spells a special
    token is ordinary text, and there is no end-of-text.

    Raises:
        UnknownCharacters: The vocabulary has no token for part of the text.
    """
    layout = Layout(tokenizer)
    contents = [tokenizer.encode(message.content.strip()) for message in messages]
    ids = np.concatenate([np.empty(0, np.uint32), *contents])
    roles = [ROLES.index(message.role) for message in messages]
    tokens, trained, _ = layout.join(ids, [len(each) for each in contents], roles)
    if reply:
        header = layout.headers[ASSISTANT]
        tokens, trained = np.append(tokens, header), np.append(trained, np.zeros(len(header), bool))
    return tokens, trained
