"""A conversation with a model: what `gpt chat` holds."""

from collections.abc import Generator

from gptcli.api.generate import Sampler
from gptcli.generation.samples import Sample
from gptcli.generation.text import ChatPrompt
from gptcli.tokenizers import Message


class Chat:
    """Messages, and the model's answers to them.

    Attributes:
        sampler: The model and its settings.
        messages: The system prompt, if there is one, and all turns, also those that no longer fit
            the context.
        prompt: What the last answer was drawn from, and which messages it was drawn without.
        last: The last answer; None if there was none.
    """

    def __init__(self, sampler: Sampler, system: str | None = None) -> None:
        """Begin a conversation with a model that was opened for one."""
        self.messages = [Message("system", system)] if system and system.strip() else []
        self.prompt: ChatPrompt | None = None
        self.last: Sample | None = None
        self.sampler, self._n_system, self._n_asked = sampler, len(self.messages), 0

    def ask(self, text: str) -> Generator[str]:
        """Yield the answer to a message piece by piece.

        The message and the answer then belong to the conversation, also where the answer is
        stopped early; a message with an empty answer does not.

        Raises:
            ConfigError: The message does not fit the context, or the vocabulary lacks part of it.
        """
        asked, self.last = [*self.messages, Message("user", text)], None
        answer = self.sampler.answer(asked, self._n_asked)
        try:
            for self.prompt, self.last, piece in answer:
                yield piece
        finally:
            self._n_asked += 1
            if self.last is not None and self.last.text.text.strip():
                self.messages = [*asked, Message("assistant", self.last.text.text)]

    def undo(self) -> bool:
        """Take back the last message and its answer; return whether there was one."""
        if len(self.messages) == self._n_system:
            return False
        del self.messages[-2:]
        return True

    def reset(self) -> None:
        """Start over, with the same system prompt."""
        del self.messages[self._n_system :]
