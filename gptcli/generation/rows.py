"""Decoding of texts that join and leave: rows of different lengths, each with its own settings.

A row's draws are keyed as those of `Decoding`, so a text is the same here and there. Letters as in
gpt.py.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from gptcli.config.schema import GenerateConfig
from gptcli.generation.decode import decoding_kernels, finite
from gptcli.generation.native import attention_kernel
from gptcli.generation.sampling import apply_repetition_penalty, sample_tokens
from gptcli.model import GPT, KVCache
from gptcli.seeding import derive_uniform


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
    """A draw: its token, None for one that ends the text; log-probabilities as in `Decoding`."""

    row: Row
    token: int | None
    logprob: float
    top: list[tuple[int, float]]


class Rows:
    """Texts of one model, extended by one token each at a time.

    Attributes:
        rows: The texts that grow, in the order of the cache.
    """

    def __init__(self, model: GPT) -> None:
        """Prepare for a model in evaluation mode."""
        self.rows: list[Row] = []
        self._model, self._context = model, model.config.block_size
        self._device = model.wte.weight.device
        self._kernel = attention_kernel(model)
        self._store = KVCache(self._context)  # of at least as many rows
        self._cache = self._store  # its part in use

    def join(self, rows: Sequence[Row]) -> list[Drawn]:
        """Add texts with the same tokens, which are read once; return the first draw of each."""
        logits, read = self._read(rows[0].tokens)
        for row in rows:
            self._reserve(len(self.rows) + 1, read)
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
        cache, lengths = self._cache, [row._n_cached for row in self.rows]
        last = torch.tensor([row.tokens[-2:] for row in self.rows], device=self._device)  # (B, 2)
        cache.before, cache.length, cache.position = last[:, :1], max(lengths), None
        if min(lengths) < cache.length:
            cache.position = torch.tensor(lengths, device=self._device)[:, None]
        logits = self._feed(last[:, 1:], cache)
        for row in self.rows:
            row._n_cached += 1
        for row in full:
            at, later = self.rows.index(row), row.tokens[-max(1, self._context // 2) :]
            logits[at : at + 1], read = self._read(later)
            self._place(at, read)
            row._n_cached = read.length
        return self._draw(self.rows, logits)

    def leave(self, row: Row) -> None:
        """Extend a text no more."""
        at, last = self.rows.index(row), self.rows.pop()
        if last is not row:  # the last row moves to its place
            self.rows[at] = last
            for stored in self._store.layers:
                stored[at].copy_(stored[len(self.rows)])
        self._use_rows()

    def clear(self) -> None:
        """Forget all texts, and what was stored of them."""
        self.rows = []
        self._cache = self._store = KVCache(self._context)

    def _read(self, tokens: list[int]) -> tuple[Tensor, KVCache]:
        """Read a text alone; return the logits (1, V) that follow, and what was stored."""
        cache = KVCache(len(tokens))
        return self._feed(torch.tensor([tokens], device=self._device), cache), cache

    @torch.no_grad()
    def _feed(self, tokens: Tensor, cache: KVCache) -> Tensor:
        with decoding_kernels(self._device):
            return finite(self._model.next_logits(tokens, cache).float())

    def _reserve(self, n_rows: int, like: KVCache) -> None:
        """Make room for so many rows."""
        if self._store.layers and len(self._store.layers[0]) >= n_rows:
            return
        most = 1 << (n_rows - 1).bit_length()
        grown = KVCache(self._context)
        extra = like.layers[0].shape[2] - like.size  # with offset keys, a place more
        for stored in like.layers:
            _, H, _, D = stored.shape
            grown.layers.append(stored.new_zeros(most, H, self._context + extra, D))
        for old, new in zip(self._store.layers, grown.layers, strict=False):  # the first has none
            new[: len(old)].copy_(old)
        self._store = grown

    def _place(self, at: int, read: KVCache) -> None:
        """Copy what was stored of one text to a row."""
        for stored, new in zip(self._store.layers, read.layers, strict=True):
            stored[at, :, : new.shape[2]].copy_(new[0])

    def _use_rows(self) -> None:
        """Let the cache be what the texts of now have stored."""
        layers = [layer[: len(self.rows)] for layer in self._store.layers]
        self._cache = KVCache(self._context, 0, layers, kernel=self._kernel)

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
            for at, token in zip(
                places, sample_tokens(part, some[0].config, uniforms), strict=True
            ):
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


def _explain(n_top: int, token: int, logits: Tensor) -> tuple[float, list[tuple[int, float]]]:
    """Return the log-probability of a token and the likeliest ones."""
    logprobs = logits.log_softmax(-1)
    values, ids = logprobs.topk(min(n_top, len(logits)))
    return float(logprobs[token]), list(zip(ids.tolist(), values.tolist(), strict=True))
