"""Text from a model: what `gpt generate` and `gpt chat` call, and `gptcli.generate` is."""

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from gptcli.api.evaluate import Checkpoint, device_of, open_checkpoint
from gptcli.checkpoint import TrainedModel
from gptcli.config import Config, load_config
from gptcli.config.schema import GenerateConfig
from gptcli.device import init_runtime
from gptcli.generation import Sample, encode_prompt, extend_context
from gptcli.generation.samples import DecodeTimings, draw_samples, rows_together
from gptcli.generation.text import ChatPrompt, chat_prompt, require_chat
from gptcli.generation.weights import prepare_for_decoding
from gptcli.tokenizers import Message

_log = logging.getLogger("gptcli")


def generate(
    checkpoint: Checkpoint = None,
    prompt: str | None = None,
    *,
    max_new_tokens: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: Sequence[str] | None = None,
    seed: int | None = None,
    device: str = "auto",
) -> Iterator[str]:
    """Yield a text that continues the prompt, piece by piece; "".join(...) makes it one.

    Settings that are not given are those of the run's own configuration. A checkpoint named here
    decodes with the fastest weights; what `load` returned stays as it is, in float32.

    Args:
        checkpoint: As for `load`, or what it returned.
        prompt: Text to continue; None starts from end-of-text.
        max_new_tokens: Maximum number of new tokens.
        temperature: Sampling temperature; 0 is greedy.
        top_k: Sample from the k most likely tokens.
        top_p: Nucleus sampling threshold.
        min_p: Minimum probability relative to the most likely token.
        repetition_penalty: Penalty for tokens already in the context; 1 disables it.
        stop: Stop sequences.
        seed: Random seed; in float32, the same seed gives the same text.
        device: auto, cpu, cuda or mps.

    Raises:
        GptError: The checkpoint cannot be used, or an argument is out of range; at once.
    """
    given = {"prompt": prompt, "max_new_tokens": max_new_tokens, "temperature": temperature,
             "top_k": top_k, "top_p": top_p, "min_p": min_p,
             "repetition_penalty": repetition_penalty,
             "stop": None if stop is None else list(stop)}  # fmt: skip
    flags = {f"generate.{name}": value for name, value in given.items()}
    if isinstance(checkpoint, TrainedModel):
        device = device_of(checkpoint)
    flags |= {"seed": seed, "device": device, "generate.num_samples": 1}
    sampler = Sampler(checkpoint, lambda run: load_config(None, (), flags, run))
    return (piece for _, piece in sampler.samples())


class Sampler:
    """A model ready to draw texts: samples of a prompt, or replies in a conversation.

    `config` has its settings (`seed` and the section `generate`), `weights` says in a few words
    what it decodes with, `timings` how long the last samples took.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        settings: Callable[[dict[str, Any] | None], Config],
        *,
        int8: bool = False,
        chat: bool = False,
    ) -> None:
        """Open a checkpoint.

        Args:
            checkpoint: As for `load`; what that returned keeps its weights.
            settings: Returns the configuration over the values of the run's own, which are not
                known before it is open.
            int8: Decode with 8-bit weights.
            chat: Refuse a model that was not trained on conversations.

        Raises:
            GptError: There is no such model, or it is refused.
        """
        self.trained = open_checkpoint(checkpoint, settings(None))
        if chat:
            require_chat(self.trained.tokenizer, str(self.trained.path))
        stored = self.trained.checkpoint.config
        self.config = settings({"generate": dict(stored["generate"]), "seed": stored["seed"]})
        self.weights, self.timings = "float32", DecodeTimings()
        self._context: list[int] = []
        self._turn = 0
        if not isinstance(checkpoint, TrainedModel):
            runtime, model = init_runtime(self.config), self.trained.model
            if runtime.compile:
                _log.info("note: compile applies to train and eval; generate has its own kernels")
            is_open = self.config.dtype == "auto" and runtime.device.type == "cpu"
            self.weights = prepare_for_decoding(
                model, None if is_open else runtime.dtype,
                rows=rows_together(model, self.config.generate.num_samples), int8=int8,
            )  # fmt: skip

    def samples(self, *, logprobs: bool = False) -> Iterator[tuple[Sample, str]]:
        """Return an iterator over (sample, text newly certain) of the prompt's samples."""
        trained, wanted = self.trained, self.config.generate
        ids = encode_prompt(trained.tokenizer, wanted.prompt, trained.model.config.block_size)
        return self._draw(ids, wanted, range(wanted.num_samples), logprobs)

    def reply(self, line: str) -> Iterator[str]:
        """Yield what continues a line, with all lines and replies before it as context."""
        model, tokenizer = self.trained.model, self.trained.tokenizer
        self._context = extend_context(tokenizer, self._context, line, model.config.block_size)
        sample = None
        try:
            for sample, piece in self._draw(  # noqa: B007  # kept for the context
                self._context, self.config.generate, [self._turn]
            ):
                yield piece
        finally:  # also where Ctrl-C ends a reply early
            if sample is not None:
                self._context = sample.row.tokens + [tokenizer.eot] * sample.is_ended
            self._turn += 1

    def answer(
        self, messages: Sequence[Message], number: int
    ) -> Iterator[tuple[ChatPrompt, Sample, str]]:
        """Yield the prompt, the answer, and its text newly certain; `number` names the draws.

        Raises:
            ConfigError: The last message does not fit the context, or cannot be encoded.
        """
        wanted, block_size = self.config.generate, self.trained.model.config.block_size
        prompt = chat_prompt(self.trained.tokenizer, messages, block_size, wanted.max_new_tokens)
        wanted = wanted.model_copy(update={"max_new_tokens": prompt.room})
        for sample, piece in self._draw(prompt.ids, wanted, [number]):
            yield prompt, sample, piece

    def _draw(
        self, ids: list[int], wanted: GenerateConfig, numbers: Sequence[int], logprobs: bool = False
    ) -> Iterator[tuple[Sample, str]]:
        self.timings = DecodeTimings()
        return draw_samples(
            self.trained.model, self.trained.tokenizer, ids, wanted, seed=self.config.seed,
            numbers=numbers, clock=self.timings, logprobs=logprobs,
        )  # fmt: skip


class Chat:
    """A conversation: messages, and the model's answers to them.

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
