"""Batched decoding with a key/value cache: ids in, ids out.

Each draw is a function of its key, so sample k of a seed is the same text alone or in a batch.
Letters as in gpt.py.
"""

import contextlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptcli.config.schema import GenerateConfig
from gptcli.errors import CheckpointError
from gptcli.generation.sampling import apply_repetition_penalty, sample_tokens
from gptcli.model import GPT
from gptcli.model.cache import KVCache
from gptcli.seeding import derive_uniform


class SampledToken(NamedTuple):
    """A token of a sample.

    Attributes:
        sample: Which of the texts.
        token: Its id.
        logprob: The network's log-probability of it, in nats, before temperature and the like.
    """

    sample: int
    token: int
    logprob: float


class Decoding:
    """Several samples of one prompt, a token each at a time.

    When the context is full, its later half is read again and drawing goes on.

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
    ) -> None:
        """Begin; the prompt is read with the first step.

        Args:
            model: In evaluation mode.
            prompt: One to `context` ids.
            config: How to sample.
            ends: The ids that end a text.
            seed: With the sample and the position, the key of each draw.
            samples: Numbers of the texts.
            logprobs: Whether to find the log-probabilities; 0 otherwise.
            context: Most tokens to attend to; None is all that the network can.
        """
        self._context = context or model.config.block_size
        assert 0 < len(prompt) <= self._context
        self.alive = list(samples)
        self._model, self._config, self._seed = model, config, seed
        self._ends, self._wants_logprobs = ends, logprobs
        self._texts = {sample: list(prompt) for sample in samples}
        self._n_drawn = 0
        self._cache: KVCache | None = None
        n_tokens = model.n_tokens
        self._seen = torch.zeros(len(self.alive), n_tokens, dtype=torch.bool)
        if config.repetition_penalty != 1:
            self._seen[:, [token for token in prompt if token < n_tokens]] = True

    def __iter__(self) -> Iterator[SampledToken]:
        """Yield tokens until no sample grows."""
        while self.alive:
            yield from self.step()

    def step(self) -> list[SampledToken]:
        """Return the next token of every sample that grows; end-of-text ends one unreturned."""
        logits = self._next_logits()
        position, config = self._n_drawn, self._config
        uniforms = [derive_uniform("draw", self._seed, sample, position) for sample in self.alive]
        scores = logits
        if config.repetition_penalty != 1:
            scores = apply_repetition_penalty(logits, self._seen, config.repetition_penalty)
        tokens = sample_tokens(scores, config, uniforms)
        logprobs = self._logprobs(logits, tokens)
        self._n_drawn += 1
        drawn = []
        for row, (sample, token) in enumerate(zip(tuple(self.alive), tokens, strict=True)):
            if token in self._ends:
                continue
            self._texts[sample].append(token)
            if config.repetition_penalty != 1:
                self._seen[row, token] = True
            drawn.append(SampledToken(sample, token, logprobs[row]))
        self._keep([found.sample for found in drawn])
        if self._n_drawn == config.max_new_tokens:
            self._keep([])
        return drawn

    def end(self, sample: int) -> None:
        """Draw no more tokens of `sample`."""
        self._keep([other for other in self.alive if other != sample])

    def _next_logits(self) -> Tensor:
        """Feed what the cache has not seen; return the logits (B, V) that follow, on the CPU."""
        texts = [self._texts[sample] for sample in self.alive]
        if self._cache is None:  # the prompt is the same for all: it is read once
            size = min(self._context, len(texts[0]) + self._config.max_new_tokens)
            first = self._model.empty_cache(1, size)
            logits = self._feed(texts[:1], first)
            self._cache = first.repeated(len(texts))
            return logits.expand(len(texts), -1)
        if self._cache.length == self._context:
            self._cache.length = 0
            return self._feed([text[-max(1, self._context // 2) :] for text in texts], self._cache)
        return self._feed([text[-1:] for text in texts], self._cache)

    @torch.no_grad()
    def _feed(self, tokens: list[list[int]], cache: KVCache) -> Tensor:
        device = self._model.wte.weight.device
        with decoding_kernels(device):
            logits = self._model.next_logits(torch.tensor(tokens, device=device), cache)
        logits = logits.float().cpu()  # (B, V)
        if not bool(logits.isfinite().all()):
            raise CheckpointError(
                "the model's output is not finite",
                "if its weights are sound, -s dtype=float32 has room for it",
            )
        return logits

    def _logprobs(self, logits: Tensor, tokens: list[int]) -> list[float]:
        if not self._wants_logprobs:
            return [0.0] * len(tokens)
        found = logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])
        values: list[float] = found[:, 0].tolist()
        return values

    def _keep(self, samples: list[int]) -> None:
        """Go on with these samples only."""
        rows = [row for row, sample in enumerate(self.alive) if sample in samples]
        if len(rows) == len(self.alive):
            return
        self.alive = [self.alive[row] for row in rows]
        self._seen = self._seen[rows]
        if self._cache is not None and rows:
            self._cache = self._cache.of_rows(rows)


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
