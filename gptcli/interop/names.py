"""Weights and settings by our names and by those of other programs: one table for all formats."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gptcli.config.model import ModelConfig


class Table(NamedTuple):
    """The names of a format: their module for ours.

    `{}` is the block's number, `*` each of q, k and v, whose rows our `c_attn` holds in that order.
    """

    names: dict[str, str]
    settings: Sequence[tuple[str, str, object]] = ()  # theirs, ours, what leaving it out means
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
# Settings: ours; GPT-2's and Llama's in Hugging Face's files, with what a file means that leaves
# one out (`...`: it must be there); those of GGUF. n_positions overrides n_ctx, its old name.
_SETTINGS: tuple[tuple[str, dict[str, object], dict[str, object], tuple[str, ...]], ...] = (
    ("vocab_size", {"vocab_size": ...}, {"vocab_size": ...}, ()),
    ("tie_embeddings", {"tie_word_embeddings": True}, {"tie_word_embeddings": False}, ()),
    ("n_layer", {"n_layer": ...}, {"num_hidden_layers": ...}, ("block_count",)),
    ("block_size", {"n_ctx": None, "n_positions": 1024}, {"max_position_embeddings": 2048},
     ("context_length",)),
    ("n_embd", {"n_embd": ...}, {"hidden_size": ...}, ("embedding_length",)),
    ("n_inner", {"n_inner": None}, {"intermediate_size": ...}, ("feed_forward_length",)),
    ("n_head", {"n_head": ...}, {"num_attention_heads": ...}, ("attention.head_count",)),
    ("n_kv_head", {}, {"num_key_value_heads": None}, ("attention.head_count_kv",)),
    ("head_dim", {}, {"head_dim": None},
     ("rope.dimension_count", "attention.key_length", "attention.value_length")),
    ("mlp", {"activation_function": "gelu_new"}, {"hidden_act": "silu"}, ()),
    ("norm_eps", {"layer_norm_epsilon": 1e-5}, {}, ("attention.layer_norm_epsilon",)),
    ("norm_eps", {}, {"rms_norm_eps": 1e-6}, ("attention.layer_norm_rms_epsilon",)),
    ("rope_theta", {}, {"rope_theta": 10000.0}, ("rope.freq_base",)),
)  # fmt: skip
_GPT2 = [(key, row[0], default) for row in _SETTINGS for key, default in row[1].items()]
_LLAMA = [(key, row[0], default) for row in _SETTINGS for key, default in row[2].items()]
_GGUF_GPT2 = [(key, row[0], ...) for row in _SETTINGS if row[1] for key in row[3]]
_GGUF_LLAMA = [(key, row[0], ...) for row in _SETTINGS if row[2] for key in row[3]]

NANOGPT = Table({ours: f"transformer.{ours}" for ours, *_ in _MODULES} | {"lm_head": "lm_head"})
GPT2 = Table(NANOGPT.names, _GPT2, is_transposed=True)
LLAMA = Table({ours: theirs for ours, theirs, _ in _MODULES if theirs is not None}, _LLAMA)
GGUF_LLAMA = Table({ours: theirs for ours, _, theirs in _MODULES}, _GGUF_LLAMA)
GGUF_GPT2 = Table(GGUF_LLAMA.names | {"h.{}.attn.c_attn": "blk.{}.attn_qkv"}, _GGUF_GPT2)

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
