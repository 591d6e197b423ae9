"""The shape of a network in our configuration and in Hugging Face's `config.json`.

Four families can hold what the schema can say: GPT-2, Llama, Qwen2 (biases on queries, keys and
values only) and Qwen3 (normalised queries and keys). What none of them can hold is named.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ValidationError

from gptcli.config.model import ModelConfig
from gptcli.errors import CheckpointError, ConfigError
from gptcli.interop.names import GPT2, LLAMA, Table

Family = Literal["gpt2", "llama", "qwen2", "qwen3"]
_Keys = dict[str, tuple[object, ...]]  # what a model has, then what a family holds
_CLASSES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_ACTIVATIONS = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu": "gelu_erf",
    "relu2": "relu2",
}


def table_of(family: Family) -> Table:
    """Return the names of a family's weights in Hugging Face's files."""
    return GPT2 if family == "gpt2" else LLAMA


def family_of(model: ModelConfig) -> Family:
    """Return the family that can hold a model.

    Raises:
        ConfigError: None can; the keys that differ from the nearest are named.
    """
    qkv_bias = model.bias if model.qkv_bias is None else model.qkv_bias
    gpt2: _Keys = {
        "model.norm": (model.norm, "layernorm"),
        "model.position": (model.position, "learned"),
        "model.mlp": (model.mlp, "gelu", "gelu_erf", "relu2"),
        "model.n_kv_head": (model.n_kv_head or model.n_head, model.n_head),
        "model.head_dim": (model.head_size, model.n_embd // model.n_head),
        "model.qk_norm": (model.qk_norm, False),
    }
    llama: _Keys = {
        "model.norm": (model.norm, "rmsnorm"),
        "model.position": (model.position, "rope"),
        "model.mlp": (model.mlp, "swiglu"),
    }
    family: Family = "llama"
    if model.qk_norm:
        family = "qwen3"
        llama |= {
            "model.bias": (model.bias, False),
            "model.qkv_bias": (bool(model.qkv_bias), False),
        }
    elif qkv_bias != model.bias:
        family = "qwen2"
        llama["model.qkv_bias"] = (qkv_bias, True)
    wrong, nearest = min(
        (({key: values for key, values in keys.items() if values[0] not in values[1:]}, name)
         for keys, name in ((llama, family), (gpt2, "gpt2"))),
        key=lambda found: len(found[0]),
    )  # fmt: skip
    if not wrong:
        return nearest
    shown = ", ".join(
        f"{key}={_spelled(value)} (not {' or '.join(map(_spelled, allowed))})"
        for key, (value, *allowed) in wrong.items()
    )
    settings = " ".join(f"-s {key}={_spelled(values[1])}" for key, values in wrong.items())
    raise ConfigError(
        f"no other program's format holds this model: the nearest is {nearest}, but {shown}",
        f"train a model that can be exported: {settings}",
    )


def _spelled(value: object) -> str:
    return str(value).lower()


def to_hugging_face(
    model: ModelConfig, family: Family, vocab_size: int, eot: int
) -> dict[str, Any]:
    """Return the content of `config.json`.

    Args:
        model: The network; `vocab_size` stands for its own, which may be padded.
        family: From `family_of`.
        vocab_size: Rows of the embedding in the exported file.
        eot: The id of end-of-text.
    """
    common = {
        "architectures": [_CLASSES[family]],
        "model_type": family,
        "vocab_size": vocab_size,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "tie_word_embeddings": model.tie_embeddings,
        "torch_dtype": "float32",
        "use_cache": True,
    }
    if family == "gpt2":
        activation = {"gelu": "gelu_new", "gelu_erf": "gelu"}.get(model.mlp, model.mlp)
        return common | {
            "n_layer": model.n_layer,
            "n_head": model.n_head,
            "n_embd": model.n_embd,
            "n_positions": model.block_size,
            "n_ctx": model.block_size,
            "n_inner": model.n_inner,
            "activation_function": activation,
            "layer_norm_epsilon": model.norm_eps,
            "embd_pdrop": model.dropout,
            "attn_pdrop": model.dropout,
            "resid_pdrop": model.dropout,
        }
    qkv_bias = model.bias if model.qkv_bias is None else model.qkv_bias
    shape = {
        "hidden_size": model.n_embd,
        "intermediate_size": model.mlp_width,
        "num_hidden_layers": model.n_layer,
        "num_attention_heads": model.n_head,
        "num_key_value_heads": model.n_kv_head or model.n_head,
        "head_dim": model.head_size,
        "max_position_embeddings": model.block_size,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        # Older readers know the first, transformers from 5 on the second.
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "attention_dropout": model.dropout,
    }
    if family == "llama":
        shape |= {"attention_bias": qkv_bias, "mlp_bias": model.bias}
    elif family == "qwen3":
        shape |= {"attention_bias": False}
    return common | shape


def from_hugging_face(content: Mapping[str, Any], place: str) -> tuple[ModelConfig, Family]:
    """Return the network that a `config.json` describes, and its family.

    Args:
        content: The parsed file.
        place: Names it in errors.

    Raises:
        CheckpointError: An architecture, or a setting of it, that the network here does not have.
    """
    family = content.get("model_type")
    try:
        match family:
            case "gpt2":
                values = _from_gpt2(content, place)
            case "llama" | "qwen2" | "qwen3":
                values = _from_llama(content, family, place)
            case _:
                raise CheckpointError(
                    f"{place}: unknown architecture {str(family)[:60]!r}",
                    f"the architectures read here: {', '.join(_CLASSES)}",
                )
        return ModelConfig(**values), family
    except KeyError as error:
        raise CheckpointError(f"{place}: {error} is missing") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "shape"
        raise CheckpointError(f"{place}: {key}: {first['msg']}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{place}: not the description of a network ({error})") from error


def _from_gpt2(content: Mapping[str, Any], place: str) -> dict[str, Any]:
    _refuse_other(
        content,
        place,
        scale_attn_weights=True,
        scale_attn_by_inverse_layer_idx=False,
        add_cross_attention=False,
    )
    activation = content.get("activation_function", "gelu_new")
    if activation not in _ACTIVATIONS:
        raise CheckpointError(f"{place}: activation_function {activation!r} is not supported")
    return {
        "n_layer": content["n_layer"],
        "n_head": content["n_head"],
        "n_embd": content["n_embd"],
        "n_inner": content.get("n_inner"),
        "block_size": content.get("n_positions", 1024),
        "vocab_size": content["vocab_size"],
        "norm_eps": float(content.get("layer_norm_epsilon", 1e-5)),
        "mlp": _ACTIVATIONS[activation],
        "tie_embeddings": content.get("tie_word_embeddings", True),
    }


def _from_llama(content: Mapping[str, Any], family: str, place: str) -> dict[str, Any]:
    rope = content.get("rope_parameters") or {}
    scaling = content.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise CheckpointError(f"{place}: rope_scaling of type {kind!r} is not supported")
    if set(content.get("layer_types") or []) - {"full_attention"}:
        raise CheckpointError(f"{place}: layer_types other than full_attention are not supported")
    _refuse_other(content, place, hidden_act="silu", use_sliding_window=False, pretraining_tp=1)
    n_head, width = content["num_attention_heads"], content["hidden_size"]
    n_kv_head = content.get("num_key_value_heads") or n_head
    head_dim = content.get("head_dim") or (128 if family == "qwen3" else None)
    attention_bias = content.get("attention_bias", False)
    if family == "qwen3" and attention_bias:
        raise CheckpointError(f"{place}: attention_bias is not supported")
    return {
        "n_layer": content["num_hidden_layers"],
        "n_head": n_head,
        "n_kv_head": None if n_kv_head == n_head else n_kv_head,
        "n_embd": width,
        "n_inner": content["intermediate_size"],
        "head_dim": None if head_dim is None or head_dim * n_head == width else head_dim,
        "block_size": content.get("max_position_embeddings", 2048),
        "vocab_size": content["vocab_size"],
        # One of the two alone is the same model with zeros for the other's biases.
        "bias": family == "llama" and bool(attention_bias or content.get("mlp_bias", False)),
        "qkv_bias": True if family == "qwen2" else None,
        "norm": "rmsnorm",
        "norm_eps": float(content.get("rms_norm_eps", 1e-6)),
        "position": "rope",
        "rope_theta": float(rope.get("rope_theta", content.get("rope_theta", 10000.0))),
        "mlp": "swiglu",
        "qk_norm": family == "qwen3",
        "tie_embeddings": content.get("tie_word_embeddings", False),
    }


def _refuse_other(content: Mapping[str, Any], place: str, **known: object) -> None:
    for key, value in known.items():
        if content.get(key, value) != value:
            raise CheckpointError(f"{place}: {key}={content[key]!r} is not supported")
