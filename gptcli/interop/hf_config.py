"""The shape of a model in our configuration and in Hugging Face's `config.json`, both ways.

Four families can hold what the schema can say: GPT-2, Llama, Qwen2 (biases on queries, keys and
values only) and Qwen3 (normalized queries and keys). What none of them can hold is named.
"""

from collections.abc import Mapping
from typing import Any, Literal, cast

from pydantic import ValidationError

from gptcli.config.model import ModelConfig
from gptcli.errors import CheckpointError, ConfigError
from gptcli.interop.names import GPT2, LLAMA, Table

Family = Literal["gpt2", "llama", "qwen2", "qwen3"]
Allowed = dict[str, tuple[object, ...]]  # keys of `model` and the values that a format can hold
_CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM",
            "qwen3": "Qwen3ForCausalLM"}  # fmt: skip
_ACTIVATIONS = {"gelu": "gelu_new", "gelu_erf": "gelu", "swiglu": "silu", "relu2": "relu2"}
_MLPS = {theirs: ours for ours, theirs in _ACTIVATIONS.items()} | {"gelu_pytorch_tanh": "gelu"}

# What no other program has.
OURS_ALONE: Allowed = {
    "x0_scalars": (False,),
    "n_value_embd": (0,),
    "bigram_rows": (0,),
    "key_offset": (False,),
}

# Settings of theirs that change the computation, with the only value supported.
_GPT2_FIXED: dict[str, object] = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
_LLAMA_FIXED: dict[str, object] = {
    "hidden_act": "silu",
    "use_sliding_window": False,
    "pretraining_tp": 1,
}


def table_of(family: Family) -> Table:
    """Return the names of a family's weights in Hugging Face's files."""
    return GPT2 if family == "gpt2" else LLAMA


def differing(model: ModelConfig, allowed: Allowed) -> dict[str, str]:
    """Return `model.key=value` for each key whose value a format cannot hold."""
    shape = dict(model.resolved())
    wrong = [key for key, values in allowed.items() if shape[key] not in values]
    return {key: f"model.{key}={_spelled(shape[key])}" for key in wrong}


def _spelled(value: object) -> str:
    return str(value).lower()


def family_of(model: ModelConfig) -> Family:
    """Return the family that can hold a model.

    Raises:
        ConfigError: None can; the keys that differ from the nearest are named.
    """
    gpt2: Allowed = {
        "norm": ("layernorm",),
        "position": ("learned",),
        "mlp": ("gelu", "gelu_erf", "relu2"),
        "n_kv_head": (model.n_head,),
        "head_dim": (model.n_embd // model.n_head,),
        "qk_norm": (False,),
        **OURS_ALONE,
    }
    llama: Allowed = {"norm": ("rmsnorm",), "position": ("rope",), "mlp": ("swiglu",), **OURS_ALONE}
    family: Family = "llama"
    if model.qk_norm:
        family = "qwen3"
        llama |= {"bias": (False,)} | ({"qkv_bias": (False,)} if model.qkv_bias else {})
    elif model.resolved().qkv_bias != model.bias:
        family = "qwen2"
        llama |= {"qkv_bias": (True,)}
    candidates: list[tuple[Family, Allowed]] = [(family, llama), ("gpt2", gpt2)]
    nearest, allowed = min(candidates, key=lambda one: len(differing(model, one[1])))
    wrong = differing(model, allowed)
    if not wrong:
        return nearest
    shown = ", ".join(
        f"{setting} (not {' or '.join(map(_spelled, allowed[key]))})"
        for key, setting in wrong.items()
    )
    settings = " ".join(f"-s model.{key}={_spelled(allowed[key][0])}" for key in wrong)
    raise ConfigError(
        f"no export format holds this model: the nearest is {nearest}, but {shown}",
        f"train a model that can be exported: {settings}",
    )


def to_hugging_face(
    model: ModelConfig, family: Family, vocab_size: int, eot: int
) -> dict[str, Any]:
    """Return the content of `config.json`, with `vocab_size` rows of the embedding."""
    shape = model if family == "gpt2" else model.resolved()  # GPT-2 may leave n_inner out
    ours = dict(shape) | {"vocab_size": vocab_size, "mlp": _ACTIVATIONS[model.mlp]}
    content: dict[str, Any] = {
        "architectures": [_CLASSES[family]],
        "model_type": family,
        "vocab_size": vocab_size,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "tie_word_embeddings": model.tie_embeddings,
        "torch_dtype": "float32",
        "use_cache": True,
    }
    content |= {theirs: ours[key] for theirs, key, _ in table_of(family).settings}
    if family == "gpt2":
        dropouts = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), model.dropout)
        return content | dropouts
    # Older readers know rope_theta, transformers from 5 on this.
    content["rope_parameters"] = {"rope_type": "default", "rope_theta": model.rope_theta}
    content["attention_dropout"] = model.dropout
    biases: dict[str, dict[str, Any]]
    biases = {"llama": {"attention_bias": shape.qkv_bias, "mlp_bias": model.bias},
              "qwen3": {"attention_bias": False}}  # fmt: skip
    return content | biases.get(family, {})


def from_hugging_face(content: Mapping[str, Any], place: str) -> tuple[ModelConfig, Family]:
    """Return the model that a `config.json` describes, and its family.

    Raises:
        CheckpointError: An architecture, or a setting of it, that is not supported.
    """
    try:
        if content.get("model_type") not in _CLASSES:
            raise CheckpointError(
                f"{place}: unknown architecture {str(content.get('model_type'))[:60]!r}",
                f"the supported architectures: {', '.join(_CLASSES)}",
            )
        family = cast(Family, content["model_type"])
        read = _from_gpt2 if family == "gpt2" else _from_llama
        return ModelConfig(**read(content, family, place)), family
    except KeyError as error:
        raise CheckpointError(f"{place}: {error} is missing") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "shape"
        raise CheckpointError(f"{place}: {key}: {first['msg']}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{place}: not the description of a model ({error})") from error


def _from_gpt2(content: Mapping[str, Any], family: Family, place: str) -> dict[str, Any]:
    values = _values(content, GPT2, _GPT2_FIXED, place)
    if values["mlp"] not in _MLPS or values["mlp"] == "silu":
        raise CheckpointError(f"{place}: activation_function={values['mlp']!r} is not supported")
    return values | {"mlp": _MLPS[values["mlp"]]}


def _from_llama(content: Mapping[str, Any], family: Family, place: str) -> dict[str, Any]:
    rope = content.get("rope_parameters") or {}
    scaling = content.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise CheckpointError(f"{place}: rope_scaling of type {kind!r} is not supported")
    if set(content.get("layer_types") or []) - {"full_attention"}:
        raise CheckpointError(f"{place}: layer_types other than full_attention are not supported")
    fixed = _LLAMA_FIXED | ({"attention_bias": False} if family == "qwen3" else {})
    values = _values({**content, **rope}, LLAMA, fixed, place)
    n_head, n_embd = values["n_head"], values["n_embd"]
    # Null where it means this value.
    if values["n_kv_head"] == n_head:
        values["n_kv_head"] = None
    head_dim = values["head_dim"] or (128 if family == "qwen3" else None)
    values["head_dim"] = None if head_dim and head_dim * n_head == n_embd else head_dim
    # One of the two alone is the same model with zeros for the biases of the other.
    has_bias = bool(content.get("attention_bias", False) or content.get("mlp_bias", False))
    return values | {
        "bias": family == "llama" and has_bias,
        "qkv_bias": True if family == "qwen2" else None,
        "norm": "rmsnorm",
        "position": "rope",
        "mlp": "swiglu",
        "qk_norm": family == "qwen3",
    }


def _values(
    content: Mapping[str, Any], table: Table, fixed: Mapping[str, object], place: str
) -> dict[str, Any]:
    """Return the values of our keys; refuse what differs from those `fixed`."""
    for key, value in fixed.items():
        if content.get(key, value) != value:
            raise CheckpointError(f"{place}: {key}={content[key]!r} is not supported")
    return {
        ours: content[theirs] if default is ... else content.get(theirs, default)
        for theirs, ours, default in table.settings
    }
