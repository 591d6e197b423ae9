"""Batched decoding with a key/value cache: ids in, ids out.

Each draw is a function of its key, so sample k of a seed is the same text alone or in a batch.
Letters as in gpt.py.
"""

import contextlib
import math
import time
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from gptcli.config.schema import GenerateConfig
from gptcli.errors import CheckpointError, ConfigError, is_out_of_memory
from gptcli.generation.sampling import apply_repetition_penalty, sample_tokens
from gptcli.generation.text import TextStream
from gptcli.model import GPT, KVCache
from gptcli.seeding import derive_uniform
from gptcli.tokenizers import Tokenizer

_MAX_ROWS = 64  # samples decoded together
_CACHE_BYTES = {"cpu": 1 << 30, "cuda": 1 << 33, "mps": 1 << 30}  # of their keys and values


class SampledToken(NamedTuple):
    """A token of a sample, with its log-probability in nats before temperature and the like."""

    sample: int
    token: int
    logprob: float


class Decoding:
    """Several samples of one prompt, extended by one token each at a time.

    When the context is full, its later half is read again and sampling continues.

    Attributes:
        alive: The samples that still grow, in the order of the rows.
    """

    def __init__(
        self,
        model: GPT,
        prompt: Sequence[int],
        config: GenerateConfig,
        *,
        ends: Collection[int],
        seed: int,
        samples: Sequence[int] = (0,),
        logprobs: bool = False,
        context: int | None = None,
        replay: bool = False,
    ) -> None:
        """Prepare; the prompt is read with the first step.

        Args:
            model: In evaluation mode.
            prompt: One to `context` ids.
            config: How to sample.
            ends: The ids that end a text.
            seed: With the number in `samples` and the position, the key of each draw.
            samples: Numbers of the samples.
            logprobs: Whether to compute log-probabilities; 0 otherwise.
            context: The most tokens to attend to; None is the model's context.
            replay: Record the step of one token and replay it, which CUDA graphs do.
        """
        from gptcli.generation.native import attention_kernel  # built only where text is drawn

        self._context = context or model.config.block_size
        assert 0 < len(prompt) <= self._context
        self.alive = list(samples)
        self._rows = list(samples)  # of the cache; a recorded step keeps those that have ended
        self._replay = replay
        self._step_graph: StepGraph | None = None
        self._model, self._config, self._seed = model, config, seed
        self._ends, self._wants_logprobs = ends, logprobs
        self._texts = {sample: list(prompt) for sample in samples}
        self._n_drawn = 0
        self._cache = KVCache(
            min(self._context, len(prompt) + config.max_new_tokens), kernel=attention_kernel(model)
        )

    def __iter__(self) -> Iterator[SampledToken]:
        """Yield tokens until no sample grows."""
        while self.alive:
            yield from self.step()

    def step(self) -> list[SampledToken]:
        """Return the next token of every sample that grows; end-of-text ends one unreturned."""
        logits = self._next_logits()
        uniforms = [derive_uniform("draw", self._seed, k, self._n_drawn) for k in self.alive]
        tokens = sample_tokens(self._penalized(logits), self._config, uniforms)
        logprobs = [0.0] * len(tokens)
        if self._wants_logprobs:
            chosen = torch.tensor(tokens, device=logits.device)[:, None]
            logprobs = logits.log_softmax(-1).gather(-1, chosen)[:, 0].tolist()
        sampled = map(SampledToken, self.alive, tokens, logprobs)
        drawn = [one for one in sampled if one.token not in self._ends]
        for sample, token, _ in drawn:
            self._texts[sample].append(token)
        self._n_drawn += 1
        is_last = self._n_drawn == self._config.max_new_tokens
        self._keep([] if is_last else [one.sample for one in drawn])
        return drawn

    def end(self, sample: int) -> None:
        """Draw no more tokens of `sample`."""
        self._keep([other for other in self.alive if other != sample])

    def _next_logits(self) -> Tensor:
        """Feed what the cache has not seen; return the logits (B, V) that follow."""
        if self._n_drawn and self._cache.length == self._context and self._rows != self.alive:
            self._keep_only(self.alive)  # the others have ended, with texts of other lengths
        texts = [self._texts[sample] for sample in self._rows]
        if self._n_drawn == 0:  # the prompt is the same for all: it is read once
            logits = self._feed(texts[:1])
            self._cache = self._cache.of_rows([0] * len(texts))
            return logits.expand(len(texts), -1)
        if self._cache.length == self._context:
            self._forget_graph()
            self._cache.length = 0
            logits = self._feed([text[-max(1, self._context // 2) :] for text in texts])
        else:
            logits = self._feed([text[-1:] for text in texts], self._replay)
        if len(self._rows) == len(self.alive):
            return logits
        return logits[[self._rows.index(sample) for sample in self.alive]]

    @torch.no_grad()
    def _feed(self, tokens: list[list[int]], replay: bool = False) -> Tensor:
        device = self._model.wte.weight.device
        with decoding_kernels(device):
            if replay and self._step_graph is None:
                self._record()
            if self._step_graph is not None:
                logits = self._step_graph(tokens)
            else:
                logits = self._model.next_logits(torch.tensor(tokens, device=device), self._cache)
        return finite(logits.float())  # (B, V); they stay on the device, and only ids come down

    def _penalized(self, logits: Tensor) -> Tensor:
        if self._config.repetition_penalty == 1:
            return logits
        seen = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        places = [(row, token) for row, sample in enumerate(self.alive)
                  for token in self._texts[sample] if token < logits.shape[1]]  # fmt: skip
        rows, columns = torch.tensor(places, device=logits.device).unbind(1)
        seen[rows, columns] = True
        return apply_repetition_penalty(logits, seen, self._config.repetition_penalty)

    def _record(self) -> None:
        try:
            self._step_graph = StepGraph(self._model, self._cache, len(self._rows))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self._forget_graph()
            self._replay = False  # launched kernel by kernel, it is slower and as right

    def _forget_graph(self) -> None:
        self._step_graph = self._cache.position = None

    def _keep(self, samples: list[int]) -> None:
        """Continue with these samples only."""
        self.alive = [sample for sample in self.alive if sample in samples]
        # Recording again takes as long as some tokens, so half of the rows may be of ended samples.
        if 0 < len(self.alive) < len(self._rows) * (0.5 if self._replay else 1):
            self._keep_only(self.alive)

    def _keep_only(self, samples: list[int]) -> None:
        """Keep only what these samples have in the cache."""
        rows = [self._rows.index(sample) for sample in samples]
        self._forget_graph()
        self._cache, self._rows = self._cache.of_rows(rows), list(samples)


class StepGraph:
    """The step of one token for a batch, recorded as a CUDA graph: one launch, not hundreds.

    On other devices the step is the same and is computed each time.
    """

    def __init__(self, model: GPT, cache: KVCache, n_rows: int) -> None:
        self._model, self._cache = model, cache
        device = model.wte.weight.device
        self._tokens = torch.zeros(n_rows, 1, dtype=torch.int64, device=device)
        cache.position = torch.tensor([cache.length], device=device)
        self._graph = torch.cuda.CUDAGraph() if device.type == "cuda" else None
        if self._graph is not None:
            # Libraries allocate in the first calls, which a graph cannot hold. What these write
            # into the cache, at the next position, the first token overwrites.
            side = cast(Any, torch.cuda).Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._compute()
                self._compute()
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(self._graph):
                self._logits = self._compute()

    def _compute(self) -> Tensor:
        length = self._cache.length
        logits = self._model.next_logits(self._tokens, self._cache)
        self._cache.length = length
        return logits

    def __call__(self, tokens: list[list[int]]) -> Tensor:
        """Return the logits (B, V) after one token of each row, valid until the next call."""
        assert self._cache.position is not None
        self._tokens.copy_(torch.tensor(tokens))
        self._cache.position.fill_(self._cache.length)
        if self._graph is None:
            self._logits = self._compute()
        else:
            self._graph.replay()
        self._cache.length += 1
        return self._logits


def decoding_kernels(device: torch.device) -> AbstractContextManager[Any]:
    """Keep cuDNN's attention away while keys grow by one token at a time.

    It plans a kernel for every length it meets, which takes longer than thousands of tokens; with
    fewer than 8 key/value heads some of its plans are wrong (pytorch issue 193893).
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(
        [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    )


def finite(logits: Tensor) -> Tensor:
    """Return logits.

    Raises:
        CheckpointError: They are not finite.
    """
    if not math.isfinite(float(logits.sum())):  # a tenth of the time of looking at each
        raise CheckpointError(
            "the model's output is not finite",
            "if its weights are sound, -s dtype=float32 has room for it",
        )
    return logits


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
