"""Samples of a prompt as text, one after the other, decoded together."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gptcli.config.schema import GenerateConfig
from gptcli.errors import ConfigError
from gptcli.generation.decode import Row, Rows
from gptcli.generation.text import Sample
from gptcli.model import GPT
from gptcli.tokenizers import Tokenizer

_MAX_ROWS = 64  # samples decoded together
_CACHE_BYTES = {"cpu": 1 << 30, "cuda": 1 << 33, "mps": 1 << 30}  # of their keys and values


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

    Args:
        model: In evaluation mode.
        tokenizer: The model's.
        prompt: One to a context of ids.
        config: How to sample.
        seed: With a number and the position, the key of each draw.
        numbers: Of the samples.
        clock: Counts the steps.
        logprobs: Whether to compute log-probabilities.

    Raises:
        ConfigError: The prompt has a token that the model does not have.
    """
    if any(token >= model.n_tokens for token in prompt):
        raise ConfigError("the model has no token that a text starts with", "give it a prompt")
    clock, together = clock or DecodeTimings(), rows_together(model, len(numbers))
    longest = min(model.config.block_size, len(prompt) + config.max_new_tokens)  # less is allocated
    n_top, is_cuda = 0 if logprobs else None, model.wte.weight.device.type == "cuda"
    for first in range(0, len(numbers), together):
        samples = [
            Sample(n, Row(list(prompt), config, tokenizer.ends, seed, n, n_top), tokenizer)
            for n in numbers[first : first + together]
        ]
        yield from _in_order(Rows(model, longest, replay=is_cuda), samples, clock)


def _in_order(
    rows: Rows, samples: list[Sample], clock: DecodeTimings
) -> Iterator[tuple[Sample, str]]:
    waiting, sample_of = deque(samples), {sample.row: sample for sample in samples}
    while waiting:
        began = time.perf_counter()
        drawn = rows.step() if rows.rows else rows.join([*sample_of])
        clock.count(time.perf_counter() - began, sum(one.token is not None for one in drawn))
        for one in drawn:
            if sample_of[one.row].push(one):
                rows.leave(one.row)
        while waiting and (piece := waiting[0].take()):
            yield waiting[0], piece.text
            if piece.finish_reason is not None:
                waiting.popleft()
