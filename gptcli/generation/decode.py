"""Batched decoding with a key/value cache: ids in, ids out; texts join and leave at any token.

Each draw is a function of its key, so sample k of a seed is the same text alone or in a batch.
Letters as in gpt.py.
"""

import contextlib
import math
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from gptcli.config.schema import GenerateConfig
from gptcli.errors import CheckpointError, is_out_of_memory
from gptcli.generation.sampling import apply_repetition_penalty, sample_tokens
from gptcli.model import GPT, KVCache
from gptcli.seeding import derive_uniform

LogitsFn = Callable[[Tensor, KVCache], Tensor]  # as `GPT.next_logits`


@dataclass(eq=False)
class Row:
    """A text that grows, and all that its draws depend on.

    Attributes:
        tokens: One to a context of ids, then those drawn.
        config: How to sample.
        ends: The ids that end it.
        seed: With `number` and the position, the key of each draw.
        number: Of the sample.
        n_top: Alternatives to return with each token; None computes no log-probabilities.
        n_drawn: Draws so far.
    """

    tokens: list[int]
    config: GenerateConfig
    ends: Collection[int]
    seed: int
    number: int = 0
    n_top: int | None = None
    n_drawn: int = 0
    _n_cached: int = field(default=0, repr=False)

    @property
    def _how(self) -> tuple[object, ...]:
        """What rows that are drawn together have in common."""
        config = self.config
        return config.temperature, config.top_k, config.top_p, config.min_p


class Drawn(NamedTuple):
    """A draw: its token, or None if that ends the text, and the likeliest ones (id, logprob).

    Log-probabilities are in nats, before temperature and the like; 0 unless they were asked for.
    """

    row: Row
    token: int | None
    logprob: float
    top: list[tuple[int, float]]


class Rows:
    """Texts of one model, extended by one token each at a time.

    When the context of a text is full, its later half is read again and decoding continues.

    Attributes:
        rows: The texts that grow, in the order of the cache.
    """

    def __init__(self, model: GPT, context: int | None = None, *, replay: bool = False) -> None:
        """Prepare for a model in evaluation mode.

        Args:
            model: The model.
            context: The most tokens to attend to; None is the model's context.
            replay: Record a step of texts of one length and replay it, which CUDA graphs do.
        """
        from gptcli.generation.step import one_call  # built only where text is drawn

        self.rows: list[Row] = []
        self._model, self._context = model, context or model.config.block_size
        self._device = model.wte.weight.device
        self._step = one_call(model)
        self._replay, self._graph = replay, cast("StepGraph | None", None)
        self._layers = list[Tensor]()  # as those of the cache, of at least as many rows
        self._cache = KVCache(self._context)  # their part in use

    def join(self, rows: Sequence[Row]) -> list[Drawn]:
        """Add texts with the same tokens, which are read once; return the first draw of each."""
        n_rows, dtype = len(self.rows) + len(rows), None
        if self._step is not None:
            # What is wide stays so until no text is left, for each change copies all of it.
            stays = bool(self.rows) and self._layers[0].dtype == torch.float32
            dtype = torch.float32 if stays else self._step.cache_dtype(n_rows)
        logits, read = self._read([rows[0].tokens], dtype)
        self._reserve(n_rows, read)
        for row in rows:
            self._place(len(self.rows), read)
            row._n_cached = read.length
            self.rows.append(row)
        self._use_rows()
        return self._draw(rows, logits.expand(len(rows), -1))

    def step(self) -> list[Drawn]:
        """Return the next draw of every text."""
        full = [row for row in self.rows if row._n_cached == self._context]
        for row in full:
            row._n_cached = 0  # it takes part at place 0, and is overwritten then
        logits = self._next_logits()
        for row in self.rows:
            row._n_cached += 1
        # On a CPU one by one, with the same bits as alone.
        for some in [[row] for row in full] if self._device.type == "cpu" else [full] * bool(full):
            later = [row.tokens[-max(1, self._context // 2) :] for row in some]
            that_follow, read = self._read(later, self._layers[0].dtype)
            for index, row in enumerate(some):
                at = self.rows.index(row)
                logits[at] = that_follow[index]
                self._place(at, read, index)
                row._n_cached = read.length
        return self._draw(self.rows, logits)

    def leave(self, row: Row) -> None:
        """Extend a text no more."""
        at, last = self.rows.index(row), self.rows.pop()
        if last is not row:  # the last row moves to its place
            self.rows[at], n_places = last, last._n_cached + 1  # half of a next key waits
            for stored in self._layers:
                stored[at, :, :n_places].copy_(stored[len(self.rows), :, :n_places])
        self._use_rows()

    def clear(self) -> None:
        """Forget all texts, and what was stored of them."""
        self.rows, self._layers, self._graph = [], [], None
        self._use_rows()

    def _read(
        self, texts: list[list[int]], dtype: torch.dtype | None = None
    ) -> tuple[Tensor, KVCache]:
        """Read texts of one length; return the logits (B, V) that follow, and what was stored."""
        tokens = torch.tensor(texts, device=self._device)
        cache = KVCache(len(texts[0]), dtype=dtype)
        return self._feed(self._fastest(tokens), tokens, cache), cache

    def _next_logits(self) -> Tensor:
        """Feed the last token of every text; return the logits (B, V) that follow."""
        cache, lengths = self._cache, [row._n_cached for row in self.rows]
        last = [row.tokens[-2:] for row in self.rows]
        if self._replay and min(lengths) == max(lengths):
            with torch.no_grad(), decoding_kernels(self._device):
                self._record(lengths[0])
                if self._graph is not None:
                    return finite(self._graph(last).float())
        tokens = torch.tensor(last, device=self._device)  # (B, 2)
        cache.before, cache.length, cache.position = tokens[:, :1], max(lengths), None
        if min(lengths) < cache.length:
            cache.position = torch.tensor(lengths, device=self._device)[:, None]
        return self._feed(self._fastest(tokens[:, 1:]), tokens[:, 1:], cache)

    def _fastest(self, tokens: Tensor) -> LogitsFn:
        """Return what feeds these tokens in the least time."""
        step = self._step
        return step if step and tokens.numel() <= step.few else self._model.next_logits

    def _record(self, length: int) -> None:
        """Record the step of texts of one length, unless that was done for about as many."""
        n_rows = len(self.rows)
        # It takes as long as some tokens, so half of the rows may be of texts that have left.
        if self._graph is None or not self._graph.n_rows / 2 <= n_rows <= self._graph.n_rows:
            cache = replace(self._cache, length=length)
            try:
                self._graph = StepGraph(self._model, cache, n_rows)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                self._replay, self._graph = False, None  # kernel by kernel, it is slower and right
        if self._graph is not None:
            self._graph.cache.length = length

    @torch.no_grad()
    def _feed(self, compute: LogitsFn, tokens: Tensor, cache: KVCache) -> Tensor:
        with decoding_kernels(self._device):
            return finite(compute(tokens, cache).float())

    def _reserve(self, n_rows: int, like: KVCache) -> None:
        """Make room for so many rows, in the precision of `like`."""
        n_old = len(self._layers[0]) if self._layers else 0
        if n_old >= n_rows and self._layers[0].dtype == like.layers[0].dtype:
            return
        n_new = n_old if n_old >= n_rows else max(n_rows, 2 * n_old)
        size = self._context + like.layers[0].shape[2] - like.size  # offset keys have a place more
        grown = [r.new_zeros(n_new, r.shape[1], size, r.shape[3]) for r in like.layers]
        for new, old in zip(grown, self._layers, strict=False):  # there are none at first
            new[:n_old].copy_(old)
        self._layers, self._graph = grown, None

    def _place(self, at: int, read: KVCache, index: int = 0) -> None:
        """Copy what was stored of a text that was read to a row."""
        for stored, new in zip(self._layers, read.layers, strict=True):
            stored[at, :, : new.shape[2]].copy_(new[index])

    def _use_rows(self) -> None:
        """Let the cache be what the texts of now have stored."""
        self._cache = KVCache(self._context, 0, [layer[: len(self.rows)] for layer in self._layers])

    def _draw(self, rows: Sequence[Row], logits: Tensor) -> list[Drawn]:
        """Draw a token for each row of logits (B, V)."""
        groups: dict[tuple[object, ...], list[int]] = {}
        for at, row in enumerate(rows):
            groups.setdefault(row._how, []).append(at)
        penalized, tokens = self._penalized(rows, logits), [0] * len(rows)
        for places in groups.values():
            some = [rows[at] for at in places]
            uniforms = [derive_uniform("draw", row.seed, row.number, row.n_drawn) for row in some]
            part = penalized if len(groups) == 1 else penalized[places]
            found = sample_tokens(part, some[0].config, uniforms)
            for at, token in zip(places, found, strict=True):
                tokens[at] = token
        drawn = []
        for at, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            logprob, top = (
                (0.0, []) if row.n_top is None else _explain(row.n_top, token, logits[at])
            )
            row.n_drawn += 1
            is_end = token in row.ends
            if not is_end:
                row.tokens.append(token)
            drawn.append(Drawn(row, None if is_end else token, logprob, top))
        return drawn

    def _penalized(self, rows: Sequence[Row], logits: Tensor) -> Tensor:
        if all(row.config.repetition_penalty == 1 for row in rows):
            return logits
        logits = logits.clone()
        for at, row in enumerate(rows):
            seen = torch.zeros_like(logits[at], dtype=torch.bool)
            seen[[token for token in row.tokens if token < len(seen)]] = True
            penalty = row.config.repetition_penalty
            logits[at] = apply_repetition_penalty(logits[at], seen, penalty)
        return logits


class StepGraph:
    """The step of one token for a batch, recorded as a CUDA graph: one launch, not hundreds.

    On other devices the step is the same and is computed each time.
    """

    def __init__(self, model: GPT, cache: KVCache, n_rows: int) -> None:
        self.cache, self.n_rows = cache, n_rows
        self._model, device = model, model.wte.weight.device
        self._last = torch.zeros(n_rows, 2, dtype=torch.int64, device=device)
        cache.before = self._last[:, :1]
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
        length, before = self.cache.length, self.cache.before
        logits = self._model.next_logits(self._last[:, 1:], self.cache)
        self.cache.length, self.cache.before = length, before
        return logits

    def __call__(self, last: list[list[int]]) -> Tensor:
        """Return the logits (B, V) that follow the last two tokens of each text."""
        assert self.cache.position is not None
        self._last[: len(last)].copy_(torch.tensor(last))
        self.cache.position.fill_(self.cache.length)
        if self._graph is None:
            self._logits = self._compute()
        else:
            self._graph.replay()
        self.cache.length += 1
        return self._logits[: len(last)]


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
            "if its weights are sound, -s dtype=float32 without --quantize has room for it",
        )
    return logits


def _explain(n_top: int, token: int, logits: Tensor) -> tuple[float, list[tuple[int, float]]]:
    """Return the log-probability of a token and the likeliest ones."""
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(n_top, len(logits)))
    return float(logprobs[token]), list(zip(ids.tolist(), values.tolist(), strict=True))
