"""Samples of a prompt as text, one after the other, decoded together."""

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

_MAX_ROWS = 64  # samples decoded together
_CACHE_BYTES = {"cpu": 1 << 30, "cuda": 1 << 33, "mps": 1 << 30}  # of their keys and values


@dataclass
class Sample:
    """One of a prompt's texts, as far as it is drawn."""

    number: int
    text: TextStream
    drawn: list[SampledToken] = field(default_factory=list)


@dataclass
class DecodeTimings:
    """Seconds until the first token, reading the prompt included; seconds and tokens after it."""

    to_first_token: float | None = None
    decoding: float = 0.0
    n_decoded: int = 0

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all samples per second of decoding."""
        return self.n_decoded / self.decoding if self.decoding else 0.0

    def count(self, seconds: float, n_tokens: int) -> None:
        """Count a step."""
        if self.to_first_token is None:
            self.to_first_token = seconds
        else:
            self.decoding += seconds
            self.n_decoded += n_tokens


def rows_together(model: GPT, n_samples: int) -> int:
    """Return how many of the samples are decoded together."""
    shape = model.config
    width = (shape.n_kv_head or shape.n_head) * shape.head_size
    bytes_per_sample = 2 * 4 * shape.n_layer * width * shape.block_size
    most = _CACHE_BYTES[model.wte.weight.device.type]
    return max(1, min(n_samples, _MAX_ROWS, most // bytes_per_sample))


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
    """Yield text as it becomes certain, one sample after the other, with its sample.

    As many as memory allows are decoded together; text of later ones waits until those before are
    finished. The last text of a sample may be empty; its `text` is then complete.

    Args are those of `Decoding`; `numbers` name the samples, and `clock` counts the steps.

    Raises:
        ConfigError: The prompt has a token that the model does not have.
    """
    if any(token >= model.n_tokens for token in prompt):
        raise ConfigError("the model has no token that a text starts with", "give it a prompt")
    clock, together = clock or DecodeTimings(), rows_together(model, len(numbers))
    for first in range(0, len(numbers), together):
        some = numbers[first : first + together]
        samples = {number: Sample(number, TextStream(tokenizer, config)) for number in some}
        decoding = Decoding(
            model, prompt, config,
            ends=tokenizer.ends, seed=seed, samples=some, logprobs=logprobs,
            replay=model.wte.weight.device.type == "cuda",
        )  # fmt: skip
        yield from _in_order(decoding, samples, clock)


def _in_order(
    decoding: Decoding, samples: dict[int, Sample], clock: DecodeTimings
) -> Iterator[tuple[Sample, str]]:
    waiting, n_yielded = deque(samples.values()), 0
    while waiting:
        began = time.perf_counter()
        drawn = decoding.step()
        clock.count(time.perf_counter() - began, len(drawn))
        for token in drawn:
            sample = samples[token.sample]
            sample.drawn.append(token)
            sample.text.push(token.token)
            if sample.text.is_stopped:
                decoding.end(sample.number)
        while waiting:
            sample = waiting[0]
            if is_done := sample.number not in decoding.alive:
                sample.text.finish()
            if (text := sample.text.text[n_yielded:]) or is_done:
                yield sample, text
            n_yielded += len(text)
            if not is_done:
                break
            waiting.popleft()
            n_yielded = 0
