"""Samples of one prompt: texts that grow together and are told one after the other."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from gptcli.config.schema import GenerateConfig
from gptcli.errors import ConfigError
from gptcli.generation.decode import Decoding, SampledToken
from gptcli.generation.text import TextStream
from gptcli.model import GPT
from gptcli.tokenizers import Tokenizer

_MOST_TOGETHER = 64  # texts
_CACHE_BYTES = 1 << 30  # of their keys and values


@dataclass
class Sample:
    """One text.

    Attributes:
        number: Which of the prompt's texts.
        text: The text, as far as it is drawn.
        drawn: What was drawn.
    """

    number: int
    text: TextStream
    drawn: list[SampledToken] = field(default_factory=list)


@dataclass
class DecodeTimings:
    """How long drawing took.

    Attributes:
        to_first_token: Seconds until the first token was drawn, the prompt's reading included.
        decoding: Seconds of all steps after the first.
        n_decoded: Tokens drawn in them.
    """

    to_first_token: float | None = None
    decoding: float = 0.0
    n_decoded: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all samples in a second of decoding."""
        return self.n_decoded / self.decoding if self.decoding else 0.0

    def count(self, seconds: float, n_tokens: int) -> None:
        """Count a step."""
        if self.to_first_token is None:
            self.to_first_token = seconds
        else:
            self.decoding += seconds
            self.n_decoded += n_tokens


def draw_samples(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    config: GenerateConfig,
    *,
    seed: int,
    numbers: Sequence[int],
    clock: DecodeTimings | None = None,
    logprobs: bool = False,
) -> Iterator[tuple[Sample, str]]:
    """Yield text as it becomes certain, a sample after the other, with the sample it belongs to.

    They are drawn together, as many as memory has room for; what comes of later ones waits until
    those before are finished. The last text of a sample may be empty; its `text` is then complete.

    Args:
        model: In evaluation mode.
        tokenizer: Of the prompt and the network.
        prompt: One to block_size ids.
        config: How to sample.
        seed: With a sample's number and the position, the key of each draw.
        numbers: Of the samples.
        clock: Counts the steps.
        logprobs: Whether to find the log-probabilities.

    Raises:
        ConfigError: The prompt has a token that the model does not have.
    """
    if any(token >= model.n_tokens for token in prompt):
        raise ConfigError("the model has no token that a text starts with", "give it a prompt")
    together = rows_together(model, len(numbers))
    clock = clock or DecodeTimings()
    for first in range(0, len(numbers), together):
        growing = {number: Sample(number, TextStream(tokenizer, config))
                   for number in numbers[first : first + together]}  # fmt: skip
        decoding = Decoding(
            model, prompt, config, ends=tokenizer.ends, seed=seed,
            samples=list(growing), logprobs=logprobs,
        )  # fmt: skip
        yield from _in_order(decoding, growing, clock)


def rows_together(model: GPT, n_samples: int) -> int:
    """Return how many of the samples are drawn together."""
    shape = model.config
    width = (shape.n_kv_head or shape.n_head) * shape.head_size
    per_text = 2 * 4 * shape.n_layer * width * shape.block_size
    return max(1, min(n_samples, _MOST_TOGETHER, _CACHE_BYTES // per_text))


def _in_order(
    decoding: Decoding, growing: dict[int, Sample], clock: DecodeTimings
) -> Iterator[tuple[Sample, str]]:
    held = dict.fromkeys(growing, "")
    waiting, ended = deque(growing), set[int]()
    while waiting:
        began = time.perf_counter()
        step = decoding.step()
        clock.count(time.perf_counter() - began, len(step))
        for drawn in step:
            sample = growing[drawn.sample]
            sample.drawn.append(drawn)
            held[drawn.sample] += sample.text.push(drawn.token)
            if sample.text.is_stopped:
                decoding.end(drawn.sample)
        for number in held.keys() - ended - set(decoding.alive):
            held[number] += growing[number].text.finish()
            ended.add(number)
        while waiting:
            text, held[waiting[0]] = held[waiting[0]], ""
            if text or waiting[0] in ended:
                yield growing[waiting[0]], text
            if waiting[0] not in ended:
                break
            waiting.popleft()
