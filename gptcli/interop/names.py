"""Weights by our names and by those of other programs: pure dict -> dict, one table a format.

A row says which of their tensors one of ours is made of, `{}` standing for the block's number.
Knows nothing of files.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gptcli.config.model import ModelConfig


class TensorSource(NamedTuple):
    """Their tensors for one of ours.

    Attributes:
        names: One, or those of queries, keys and values, which our `c_attn` holds in that order.
        how: "same", "transposed" (stored (in, out), as GPT-2's Conv1D does), or "joined" rows.
    """

    names: tuple[str, ...]
    how: Literal["same", "transposed", "joined"]


Table = Mapping[str, TensorSource]


def _same(name: str) -> TensorSource:
    return TensorSource((name,), "same")


def _transposed(name: str) -> TensorSource:
    return TensorSource((name,), "transposed")


def _joined(*names: str) -> TensorSource:
    return TensorSource(names, "joined")


NANOGPT: Table = {
    "wte.weight": _same("transformer.wte.weight"),
    "wpe.weight": _same("transformer.wpe.weight"),
    "h.{}.ln_1.weight": _same("transformer.h.{}.ln_1.weight"),
    "h.{}.ln_1.bias": _same("transformer.h.{}.ln_1.bias"),
    "h.{}.attn.c_attn.weight": _same("transformer.h.{}.attn.c_attn.weight"),
    "h.{}.attn.c_attn.bias": _same("transformer.h.{}.attn.c_attn.bias"),
    "h.{}.attn.c_proj.weight": _same("transformer.h.{}.attn.c_proj.weight"),
    "h.{}.attn.c_proj.bias": _same("transformer.h.{}.attn.c_proj.bias"),
    "h.{}.ln_2.weight": _same("transformer.h.{}.ln_2.weight"),
    "h.{}.ln_2.bias": _same("transformer.h.{}.ln_2.bias"),
    "h.{}.mlp.c_fc.weight": _same("transformer.h.{}.mlp.c_fc.weight"),
    "h.{}.mlp.c_fc.bias": _same("transformer.h.{}.mlp.c_fc.bias"),
    "h.{}.mlp.c_proj.weight": _same("transformer.h.{}.mlp.c_proj.weight"),
    "h.{}.mlp.c_proj.bias": _same("transformer.h.{}.mlp.c_proj.bias"),
    "ln_f.weight": _same("transformer.ln_f.weight"),
    "ln_f.bias": _same("transformer.ln_f.bias"),
    "lm_head.weight": _same("lm_head.weight"),
}

# The same names, its four projections stored the other way round.
GPT2: Table = {
    **NANOGPT,
    "h.{}.attn.c_attn.weight": _transposed("transformer.h.{}.attn.c_attn.weight"),
    "h.{}.attn.c_proj.weight": _transposed("transformer.h.{}.attn.c_proj.weight"),
    "h.{}.mlp.c_fc.weight": _transposed("transformer.h.{}.mlp.c_fc.weight"),
    "h.{}.mlp.c_proj.weight": _transposed("transformer.h.{}.mlp.c_proj.weight"),
}

# Llama, Qwen2 and Qwen3.
LLAMA: Table = {
    "wte.weight": _same("model.embed_tokens.weight"),
    "h.{}.ln_1.weight": _same("model.layers.{}.input_layernorm.weight"),
    "h.{}.attn.c_attn.weight": _joined(
        "model.layers.{}.self_attn.q_proj.weight",
        "model.layers.{}.self_attn.k_proj.weight",
        "model.layers.{}.self_attn.v_proj.weight",
    ),
    "h.{}.attn.c_attn.bias": _joined(
        "model.layers.{}.self_attn.q_proj.bias",
        "model.layers.{}.self_attn.k_proj.bias",
        "model.layers.{}.self_attn.v_proj.bias",
    ),
    "h.{}.attn.q_norm.weight": _same("model.layers.{}.self_attn.q_norm.weight"),
    "h.{}.attn.k_norm.weight": _same("model.layers.{}.self_attn.k_norm.weight"),
    "h.{}.attn.c_proj.weight": _same("model.layers.{}.self_attn.o_proj.weight"),
    "h.{}.attn.c_proj.bias": _same("model.layers.{}.self_attn.o_proj.bias"),
    "h.{}.ln_2.weight": _same("model.layers.{}.post_attention_layernorm.weight"),
    "h.{}.mlp.c_fc.weight": _same("model.layers.{}.mlp.up_proj.weight"),
    "h.{}.mlp.c_fc.bias": _same("model.layers.{}.mlp.up_proj.bias"),
    "h.{}.mlp.c_gate.weight": _same("model.layers.{}.mlp.gate_proj.weight"),
    "h.{}.mlp.c_gate.bias": _same("model.layers.{}.mlp.gate_proj.bias"),
    "h.{}.mlp.c_proj.weight": _same("model.layers.{}.mlp.down_proj.weight"),
    "h.{}.mlp.c_proj.bias": _same("model.layers.{}.mlp.down_proj.bias"),
    "ln_f.weight": _same("model.norm.weight"),
    "lm_head.weight": _same("lm_head.weight"),
}

GGUF_GPT2: Table = {
    "wte.weight": _same("token_embd.weight"),
    "wpe.weight": _same("position_embd.weight"),
    "h.{}.ln_1.weight": _same("blk.{}.attn_norm.weight"),
    "h.{}.ln_1.bias": _same("blk.{}.attn_norm.bias"),
    "h.{}.attn.c_attn.weight": _same("blk.{}.attn_qkv.weight"),
    "h.{}.attn.c_attn.bias": _same("blk.{}.attn_qkv.bias"),
    "h.{}.attn.c_proj.weight": _same("blk.{}.attn_output.weight"),
    "h.{}.attn.c_proj.bias": _same("blk.{}.attn_output.bias"),
    "h.{}.ln_2.weight": _same("blk.{}.ffn_norm.weight"),
    "h.{}.ln_2.bias": _same("blk.{}.ffn_norm.bias"),
    "h.{}.mlp.c_fc.weight": _same("blk.{}.ffn_up.weight"),
    "h.{}.mlp.c_fc.bias": _same("blk.{}.ffn_up.bias"),
    "h.{}.mlp.c_proj.weight": _same("blk.{}.ffn_down.weight"),
    "h.{}.mlp.c_proj.bias": _same("blk.{}.ffn_down.bias"),
    "ln_f.weight": _same("output_norm.weight"),
    "ln_f.bias": _same("output_norm.bias"),
    "lm_head.weight": _same("output.weight"),
}

GGUF_LLAMA: Table = {
    "wte.weight": _same("token_embd.weight"),
    "h.{}.ln_1.weight": _same("blk.{}.attn_norm.weight"),
    "h.{}.attn.c_attn.weight": _joined(
        "blk.{}.attn_q.weight", "blk.{}.attn_k.weight", "blk.{}.attn_v.weight"
    ),
    "h.{}.attn.c_attn.bias": _joined(
        "blk.{}.attn_q.bias", "blk.{}.attn_k.bias", "blk.{}.attn_v.bias"
    ),
    "h.{}.attn.q_norm.weight": _same("blk.{}.attn_q_norm.weight"),
    "h.{}.attn.k_norm.weight": _same("blk.{}.attn_k_norm.weight"),
    "h.{}.attn.c_proj.weight": _same("blk.{}.attn_output.weight"),
    "h.{}.attn.c_proj.bias": _same("blk.{}.attn_output.bias"),
    "h.{}.ln_2.weight": _same("blk.{}.ffn_norm.weight"),
    "h.{}.mlp.c_fc.weight": _same("blk.{}.ffn_up.weight"),
    "h.{}.mlp.c_fc.bias": _same("blk.{}.ffn_up.bias"),
    "h.{}.mlp.c_gate.weight": _same("blk.{}.ffn_gate.weight"),
    "h.{}.mlp.c_gate.bias": _same("blk.{}.ffn_gate.bias"),
    "h.{}.mlp.c_proj.weight": _same("blk.{}.ffn_down.weight"),
    "h.{}.mlp.c_proj.bias": _same("blk.{}.ffn_down.bias"),
    "ln_f.weight": _same("output_norm.weight"),
    "lm_head.weight": _same("output.weight"),
}

_BLOCK = re.compile(r"h\.(\d+)\.")


def source_of(name: str, table: Table) -> TensorSource:
    """Return which of their tensors our parameter `name` is made of.

    Raises:
        KeyError: The format has no place for it.
    """
    block = _BLOCK.match(name)
    if block is None:
        return table[name]
    source = table[f"h.{{}}.{name[block.end() :]}"]
    return TensorSource(tuple(theirs.format(block[1]) for theirs in source.names), source.how)


def to_format(ours: Mapping[str, Tensor], table: Table, config: ModelConfig) -> dict[str, Tensor]:
    """Return weights by their names; transposed ones are views.

    Args:
        ours: Weights by our names.
        table: The format.
        config: Says how the rows of a joined projection are shared out.
    """
    n_kv = config.n_kv_head or config.n_head
    rows = [n * config.head_size for n in (config.n_head, n_kv, n_kv)]
    theirs: dict[str, Tensor] = {}
    for name, weight in ours.items():
        source = source_of(name, table)
        match source.how:
            case "same":
                theirs[source.names[0]] = weight
            case "transposed":
                theirs[source.names[0]] = weight.t()
            case "joined":
                theirs |= zip(source.names, torch.split(weight, rows), strict=True)
    return theirs


def from_format(
    theirs: Mapping[str, Tensor], names: Iterable[str], table: Table
) -> dict[str, Tensor]:
    """Return the weights that our parameters `names` have, made of theirs.

    Raises:
        KeyError: One of theirs is missing.
    """
    ours: dict[str, Tensor] = {}
    for name in names:
        source = source_of(name, table)
        parts = [theirs[part] for part in source.names]
        match source.how:
            case "same":
                ours[name] = parts[0]
            case "transposed":
                ours[name] = parts[0].t()
            case "joined":
                ours[name] = torch.cat(parts)
    return ours
