"""GPT-2 on one page, with modern variants.

Every module has GPT-2's name, so weights keep their names in and out of Hugging Face.

Shapes: B batch, T tokens, S tokens seen (cache included), C n_embd, H heads, G key/value heads,
D head size, V vocabulary, L layers.
"""

import copy
import math
from functools import partial
from itertools import pairwise
from types import NoneType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gptcli.config.model import ModelConfig
from gptcli.model.attention import Heads, attention, attention_branch, can_attend, fastest_dtype
from gptcli.model.cache import KVCache, cached_attention
from gptcli.model.extras import Packed, apply_rope, bigram_rows, offset_keys, pack, rope_cache
from gptcli.model.kernels import can_normalize, can_split, rms_norm, split_heads
from gptcli.model.loss import cross_entropy, token_losses
from gptcli.model.products import activation, can_activate, linear, mlp, products_dtype


class GPTOutput(NamedTuple):
    """What a forward pass returns: logits without targets, the loss with them.

    Attributes:
        logits: (B, T, n_tokens), or None.
        loss: Sum of the negative log-likelihood over the targets that count, in nats, or None.
    """

    logits: Tensor | None
    loss: Tensor | None


class Shared(NamedTuple):
    """What all blocks read beside their input: the first one's input, and how places relate."""

    x0: Tensor
    rotation: Tensor | None
    cache: KVCache | None = None
    packed: Packed | None = None
    recompute: bool = False


class Linear(nn.Linear):
    """torch's, without its own initialization: `init_weights` draws all weights."""

    def reset_parameters(self) -> None: ...

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Embedding(nn.Embedding):
    """As `Linear`."""

    def reset_parameters(self) -> None: ...


class RMSNorm(nn.Module):
    """Root-mean-square normalization (Zhang and Sennrich 2019)."""

    def __init__(self, n_embd: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(n_embd))

    def forward(self, x: Tensor) -> Tensor:
        if can_normalize(x, self.weight):
            return rms_norm(x, self.weight, self.eps, products_dtype(x))
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def _make_norm(config: ModelConfig) -> nn.Module:
    if config.norm == "layernorm":
        return nn.LayerNorm(config.n_embd, config.norm_eps, bias=config.bias)
    return RMSNorm(config.n_embd, config.norm_eps)


class Attention(nn.Module):
    """Causal self-attention, with grouped queries (Ainslie et al. 2023) if n_kv_head is smaller."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.dropout = layer, config.dropout
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head or config.n_head
        self.head_size = config.head_size
        qkv_bias = config.bias if config.qkv_bias is None else config.qkv_bias
        width = (self.n_head + 2 * self.n_kv_head) * self.head_size
        self.c_attn = Linear(config.n_embd, width, bias=qkv_bias)
        self.c_proj = Linear(self.n_head * self.head_size, config.n_embd, bias=config.bias)
        self.q_norm = RMSNorm(self.head_size, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_size, config.norm_eps) if config.qk_norm else None
        self.key_offset, self.eps = config.key_offset, config.norm_eps

    def forward(self, x: Tensor, value: Tensor | None, shared: Shared) -> Tensor:
        B, T, _ = x.shape
        _, rotation, cache, packed, _ = shared
        dropout = self.dropout if self.training else 0.0
        offset = self.key_offset
        extras = self.q_norm, rotation, value, cache, packed
        is_plain = not (offset or dropout) and all(extra is None for extra in extras)
        is_plain = is_plain and type(self.c_attn) is type(self.c_proj) is Linear
        if is_plain and can_attend(x, self.head_size):
            return attention_branch(x, self.c_attn, self.c_proj, self.n_head, self.n_kv_head)
        rows = self.c_attn(x)  # (B, T, (H + 2G) D)
        if cache is not None:
            q, k, v = self._heads(rows, value, rotation)
            y = cached_attention(q, *cache.extend(self.layer, k, v, offset), cache.visible)
        elif packed is None and can_split(rows, self.head_size, offset):
            q, k, v = self._heads_at_once(rows, value, rotation)
            y = attention(q, k, v, dropout, packed)
        else:
            q, k, v = self._heads(rows, value, rotation)
            y = attention(q, offset_keys(k, None, packed) if offset else k, v, dropout, packed)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)
        return F.dropout(y, dropout) if dropout else y

    def _heads(self, rows: Tensor, value: Tensor | None, rotation: Tensor | None) -> Heads:
        """Return queries (B, H, T, D), keys and values (B, G, T, D), normed and in their places."""
        B, T, _ = rows.shape
        heads = rows.view(B, T, -1, self.head_size).transpose(1, 2)  # (B, H + 2G, T, D)
        qk, v = torch.split(heads, [self.n_head + self.n_kv_head, self.n_kv_head], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            # One pass over queries and keys together, scaled by the weights of each.
            q_weight = self.q_norm.weight.expand(self.n_head, 1, -1)
            k_weight = self.k_norm.weight.expand(self.n_kv_head, 1, -1)
            weight = torch.cat((q_weight, k_weight))  # (H + G, 1, D)
            qk = F.rms_norm(qk, (self.head_size,), None, self.q_norm.eps) * weight.to(qk.dtype)
        if rotation is not None:
            qk = apply_rope(qk, rotation)
        q, k = torch.split(qk, [self.n_head, self.n_kv_head], dim=1)
        if value is not None:
            v = v + value.view(B, T, self.n_kv_head, -1).transpose(1, 2).to(v.dtype)
        return q, k, v

    def _heads_at_once(self, rows: Tensor, value: Tensor | None, rotation: Tensor | None) -> Heads:
        """Do what `_heads` does in one pass, in the dtype of attention; keys are offset too."""
        weights: tuple[Tensor, Tensor] | tuple[None, None] = None, None
        if self.q_norm is not None and self.k_norm is not None:
            weights = self.q_norm.weight.float(), self.k_norm.weight.float()
        shape = self.n_head, self.n_kv_head, self.head_size
        value = None if value is None else value.float()
        dtype = fastest_dtype(rows)
        return split_heads(rows, value, weights, rotation, shape, self.eps, self.key_offset, dtype)


class MLP(nn.Module):
    """The feed-forward branch: GELU (GPT-2), squared ReLU (So et al. 2021) or SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind, self.dropout = config.mlp, config.dropout
        width, gated = config.mlp_width, config.mlp == "swiglu"
        self.c_fc = Linear(config.n_embd, width, bias=config.bias)
        self.c_gate = Linear(config.n_embd, width, bias=config.bias) if gated else None
        self.c_proj = Linear(width, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        layers = self.c_fc, self.c_gate, self.c_proj
        is_plain = all(type(layer) in (Linear, NoneType) for layer in layers)
        if is_plain and can_activate(x, self.c_fc.out_features):
            x = mlp(self.kind, x, *layers)
        else:
            up = self.c_fc(x)
            x, up = (up, None) if self.c_gate is None else (self.c_gate(x), up)
            x = self.c_proj(activation(self.kind, x, up))  # (B, T, C)
        return F.dropout(x, self.dropout) if self.training and self.dropout else x


class Block(nn.Module):
    """One transformer block: attention, then the feed-forward branch, each after a norm."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = _make_norm(config)
        self.attn = Attention(config, layer)
        self.ln_2 = _make_norm(config)
        self.mlp = MLP(config)
        self.x0_scale = nn.Parameter(torch.zeros(1)) if config.x0_scalars else None

    def forward(self, x: Tensor, value: Tensor | None, shared: Shared) -> Tensor:
        if self.x0_scale is not None:
            x = x + self.x0_scale.to(x.dtype) * shared.x0  # what entered the first block
        x = x + self.attn(self.ln_1(x), value, shared)
        x = x + self.mlp(self.ln_2(x))
        return x  # (B, T, C)


class GPT(nn.Module):
    """A GPT: embeddings, blocks, a final norm and the head (Radford et al. 2019).

    Attributes:
        is_compiled: Whether its blocks run compiled.
        n_tokens: Rows of the vocabulary that are tokens; the padding after them has no logits and
            takes no probability.
    """

    def __init__(self, config: ModelConfig, n_tokens: int | None = None) -> None:
        """Make the model, not yet initialized (see `init_weights`); vocab_size must be set."""
        super().__init__()
        assert config.vocab_size is not None
        self.config, self.n_tokens = config, n_tokens or config.vocab_size
        self.is_compiled = False
        self.wte = Embedding(config.vocab_size, config.n_embd)
        learned = config.position == "learned"
        self.wpe = Embedding(config.block_size, config.n_embd) if learned else None
        self.bigram = Embedding(config.bigram_rows, config.n_embd) if config.bigram_rows else None
        kv_width = (config.n_kv_head or config.n_head) * config.head_size
        tables = (Embedding(config.vocab_size, kv_width) for _ in range(config.n_value_embd))
        self.value_embeds = nn.ModuleList(tables) if config.n_value_embd else None
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = _make_norm(config)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.wte.weight
        if config.lora is not None:
            from gptcli.model.lora import add_adapters  # which few models have

            add_adapters(self.h, config.lora)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        starts: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        recompute: bool = False,
    ) -> GPTOutput:
        """Score tokens (B, T) int64.

        Args:
            tokens: The input; with a cache, the tokens after those it has seen.
            targets: (B, T) int64 with the next tokens, `IGNORED` where none counts.
            starts: Where in its row the text of each token begins, (B, T) int64; positions begin
                there, and no text sees another. None if each row is one text.
            cache: Filled with what this call sees.
            recompute: Keep only what enters each block, and compute the rest again in the backward
                pass (Chen et al. 2016): one more forward pass, a fraction of the memory.
        """
        x = self.hidden(tokens, cache, recompute, starts)
        if targets is not None:
            head = self.lm_head.weight
            return GPTOutput(None, cross_entropy(x, head, targets, self.n_tokens, self.is_compiled))
        return GPTOutput(self.logits(x), None)

    def logits(self, x: Tensor) -> Tensor:
        """Return the logits (B, T, n_tokens) for what `hidden` returned."""
        logits: Tensor = self.lm_head(x)
        return logits[..., : self.n_tokens]

    def next_logits(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Return the logits (B, n_tokens) that follow tokens (B, T), which the cache then holds."""
        return self.logits(self.hidden(tokens, cache)[:, -1:])[:, 0]

    def token_losses(self, tokens: Tensor, targets: Tensor, starts: Tensor | None = None) -> Tensor:
        """Return the loss of each target in nats (B, T), 0 for those `IGNORED`; no gradients."""
        x = self.hidden(tokens, starts=starts)
        return token_losses(x, self.lm_head.weight, targets, self.n_tokens)

    def hidden(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        recompute: bool = False,
        starts: Tensor | None = None,
    ) -> Tensor:
        """Return the input of the head, (B, T, C); arguments as for `forward`."""
        start = 0 if cache is None else cache.length
        T = tokens.shape[1]
        assert start + T <= self.config.block_size, "more tokens than the context holds"
        x = self.wte(tokens)  # (B, T, C)
        packed = None if starts is None else pack(starts, products_dtype(x))
        if self.bigram is not None:
            before = cache.before if cache is not None and cache.length else None
            x = x + self.bigram(bigram_rows(tokens, before, self.config.bigram_rows, packed))
        values = [table(tokens) for table in self.value_embeds or ()]  # (B, T, G D) each
        if cache is None or (positions := cache.position) is None:
            positions = torch.arange(start, start + T, device=tokens.device)
        within = positions if starts is None else positions - starts  # (T,) or (B, T)
        rotation = None
        if self.wpe is not None:
            x = x + self.wpe(within)
        else:
            rotation = rope_cache(within, self.config)
        x = F.dropout(x, self.config.dropout, self.training)
        # A copy, for a compiler makes other code for two arguments that are one tensor.
        x0 = x.clone() if self.config.x0_scalars else x
        x = self.trunk(x, values, Shared(x0, rotation, cache, packed, recompute))
        if cache is not None:
            cache.length, cache.before = cache.length + T, tokens[:, -1:]
        return x

    def trunk(self, x: Tensor, values: list[Tensor], shared: Shared) -> Tensor:
        """Pass through the blocks, the last of which take the values, and the norm, (B, T, C)."""
        return self._run(0, len(self.h), x, values, shared)

    def _run(
        self, first: int, last: int, x: Tensor, values: list[Tensor], shared: Shared
    ) -> Tensor:
        """Pass through some blocks, after the last of them the norm too: what is compiled."""
        # Dropout is the only thing a block draws: without it there is no generator state to keep.
        keep_rng = self.config.dropout > 0
        first_value = len(self.h) - len(values)
        for layer, block in enumerate(self.h[first:last], first):
            value = values[layer - first_value] if layer >= first_value else None
            if shared.recompute:
                x = checkpoint(block, x, value, shared,
                               use_reentrant=False, preserve_rng_state=keep_rng)  # fmt: skip
            else:
                x = block(x, value, shared)
        if last == len(self.h):
            x = self.ln_f(x)
        return x

    def compiled(self, n_parts: int = 1) -> "GPT":
        """Return this model, made of the same parameters, with a compiled trunk.

        Args:
            n_parts: Into how many runs of blocks the trunk is cut. DDP sums the gradients of one
                while those of the next are computed; those of a single run all come at its end.
        """
        # The embeddings stay out, for a compiler would add up their gradients in an order that
        # changes, and so does the head: on a CPU its loss works in chunks that a compiler would
        # only unroll, and on a GPU it is compiled by itself (`cross_entropy`).
        twin = copy.copy(self)
        ends = [len(self.h) * part // n_parts for part in range(n_parts + 1)]
        runs = [
            torch.compile(partial(self._run, first, last), dynamic=False)
            for first, last in pairwise(ends)
            if last > first
        ]

        def trunk(x: Tensor, values: list[Tensor], shared: Shared) -> Tensor:
            for run in runs:
                x = run(x, values, shared)
            return x

        twin.trunk = trunk  # type: ignore[method-assign]
        twin.is_compiled = True
        return twin

    def compile_blocks(self) -> None:
        """Compile each block by itself, in place: for FSDP, whose hooks stay outside of them."""
        for block in self.h:
            block.forward = torch.compile(block.forward, dynamic=False)
        self.is_compiled = True

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Initialize as GPT-2 does: normal with 0.02, smaller where branches join the residual."""
        config, std = self.config, self.config.init_std
        if std == "width":
            std = 0.58 / math.sqrt(config.n_embd)
        # zero_init: every branch begins as if it were not there.
        stds = {"c_proj": 0.0 if config.zero_init else std / math.sqrt(2 * config.n_layer)}
        if config.zero_init_head:  # the first predictions are uniform
            stds["lm_head"] = 0.0
        # Drawn on the CPU from the seed alone, so the same on every device.
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith(("bias", "x0_scale", "bigram.weight")) or "value_embeds" in name:
                parameter.zero_()  # what is added begins as if it were not there
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            else:
                deviation = stds.get(name.split(".")[-2], std)
                drawn = torch.empty(parameter.shape).normal_(0.0, deviation, generator=generator)
                parameter.copy_(drawn)

    def n_params(self) -> int:
        """Return the number of parameters, a tied head counted once."""
        return sum(parameter.numel() for parameter in self.parameters())
