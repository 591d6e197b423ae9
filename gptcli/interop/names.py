"""Weights by our names and by those of other programs: pure dict -> dict, one table for all."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from gptcli.config.model import ModelConfig


class Table(NamedTuple):
    """The names of a format: their module for ours.

    `{}` is the block's number, `*` each of q, k and v, whose rows our `c_attn` holds in that order.
    """

    names: dict[str, str]
    is_transposed: bool = False  # matrices of blocks are (in, out), as in GPT-2's Conv1D


# Ours, which are GPT-2's own without the first part; Llama's and Qwen's; those of GGUF.
_MODULES = (
    ("wte", "model.embed_tokens", "token_embd"),
    ("wpe", None, "position_embd"),
    ("h.{}.ln_1", "model.layers.{}.input_layernorm", "blk.{}.attn_norm"),
    ("h.{}.attn.c_attn", "model.layers.{}.self_attn.*_proj", "blk.{}.attn_*"),
    ("h.{}.attn.q_norm", "model.layers.{}.self_attn.q_norm", "blk.{}.attn_q_norm"),
    ("h.{}.attn.k_norm", "model.layers.{}.self_attn.k_norm", "blk.{}.attn_k_norm"),
    ("h.{}.attn.c_proj", "model.layers.{}.self_attn.o_proj", "blk.{}.attn_output"),
    ("h.{}.ln_2", "model.layers.{}.post_attention_layernorm", "blk.{}.ffn_norm"),
    ("h.{}.mlp.c_fc", "model.layers.{}.mlp.up_proj", "blk.{}.ffn_up"),
    ("h.{}.mlp.c_gate", "model.layers.{}.mlp.gate_proj", "blk.{}.ffn_gate"),
    ("h.{}.mlp.c_proj", "model.layers.{}.mlp.down_proj", "blk.{}.ffn_down"),
    ("ln_f", "model.norm", "output_norm"),
    ("lm_head", "lm_head", "output"),
)
NANOGPT = Table({ours: f"transformer.{ours}" for ours, *_ in _MODULES} | {"lm_head": "lm_head"})
GPT2 = Table(NANOGPT.names, is_transposed=True)
LLAMA = Table({ours: theirs for ours, theirs, _ in _MODULES if theirs is not None})
GGUF_LLAMA = Table({ours: theirs for ours, _, theirs in _MODULES})
GGUF_GPT2 = Table(GGUF_LLAMA.names | {"h.{}.attn.c_attn": "blk.{}.attn_qkv"})

_BLOCK = re.compile(r"h\.(\d+)\.")


def _names_of(name: str, table: Table) -> list[str]:
    """Return the names of their tensors for our parameter `name`: one, or those of q, k and v."""
    module, _, kind = name.rpartition(".")
    block = _BLOCK.match(module)
    theirs = table.names[_BLOCK.sub("h.{}.", module)].format(*block.groups() if block else ())
    return [f"{theirs.replace('*', part)}.{kind}" for part in ("qkv" if "*" in theirs else "*")]


def _is_turned(name: str, weight: Tensor, table: Table) -> bool:
    return table.is_transposed and weight.dim() == 2 and name.startswith("h.")


def to_format(ours: Mapping[str, Tensor], table: Table, config: ModelConfig) -> dict[str, Tensor]:
    """Return weights by their names; transposed ones are views.

    The model says how many rows of `c_attn` are queries, keys and values.
    """
    n_kv = config.n_kv_head or config.n_head
    rows = [n * config.head_size for n in (config.n_head, n_kv, n_kv)]
    theirs: dict[str, Tensor] = {}
    for name, weight in ours.items():
        names = _names_of(name, table)
        weight = weight.t() if _is_turned(name, weight, table) else weight
        parts = [weight] if len(names) == 1 else torch.split(weight, rows)
        theirs |= zip(names, parts, strict=True)
    return theirs


def from_format(
    theirs: Mapping[str, Tensor], names: Iterable[str], table: Table
) -> dict[str, Tensor]:
    """Return the weights of our parameters `names`, made of theirs, which must all be there."""
    ours: dict[str, Tensor] = {}
    for name in names:
        parts = [theirs[part] for part in _names_of(name, table)]
        weight = parts[0] if len(parts) == 1 else torch.cat(parts)
        ours[name] = weight.t() if _is_turned(name, weight, table) else weight
    return ours
