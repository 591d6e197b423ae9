"""nanoGPT's `ckpt.pt`: a dict with `model` and `model_args`, read without running its pickle.

nanoGPT (https://github.com/karpathy/nanoGPT) computes the exact GELU, GPT-2 the one by tanh.
"""

from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from gptcli.config.model import ModelConfig
from gptcli.errors import CheckpointError, ConfigError
from gptcli.interop.hf_weights import assumed_vocabulary
from gptcli.interop.names import NANOGPT, from_format, to_format
from gptcli.interop.weights import Pretrained, require_shapes

_ARGS = {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
_COMPILED = "_orig_mod."


def is_nanogpt(content: Any) -> bool:
    """Tell whether a loaded file is a checkpoint of nanoGPT."""
    return isinstance(content, dict) and {"model", "model_args"} <= content.keys()


def from_nanogpt(content: dict[str, Any], name: str, path: Path) -> Pretrained:
    """Open the content of a `ckpt.pt`.

    Raises:
        CheckpointError: Damaged, or of a network that nanoGPT itself does not have.
    """
    args, tensors = content["model_args"], content["model"]
    if not isinstance(args, dict) or not isinstance(tensors, dict):
        raise CheckpointError(f"{path}: model or model_args is not a dict")
    unknown = sorted(map(str, args.keys() - _ARGS))
    if unknown:
        raise CheckpointError(f"{path}: model_args has {unknown[0]!r}, which nanoGPT does not")
    try:
        shape = {key: args[key] for key in _ARGS - {"dropout"}}
        model = ModelConfig(**shape, mlp="gelu_erf")
    except KeyError as error:
        raise CheckpointError(f"{path}: model_args: {error} is missing") from error
    except ValidationError as error:
        raise CheckpointError(f"{path}: model_args: {error.errors()[0]['msg']}") from error
    theirs = {str(name).removeprefix(_COMPILED): tensor for name, tensor in tensors.items()}
    for key, tensor in theirs.items():
        if not _is_repeated(key) and not _is_plain(tensor):
            raise CheckpointError(f"{path}: {key} is not a dense tensor of floating-point numbers")

    def weights() -> dict[str, Tensor]:
        shapes = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
        names = require_shapes(shapes, model, NANOGPT, str(path), _is_repeated)
        return from_format(theirs, names, NANOGPT)

    step = content.get("iter_num")
    revision = f"step {step}" if isinstance(step, int) else None
    vocabulary, tokenizer = assumed_vocabulary(model.vocab_size)
    return Pretrained(name, str(path), revision, model, vocabulary, tokenizer, weights)


def _is_plain(tensor: Any) -> bool:
    if not isinstance(tensor, Tensor) or tensor.is_meta:
        return False
    return tensor.layout == torch.strided and tensor.is_floating_point()


def _is_repeated(name: str) -> bool:
    return name == "lm_head.weight" or name.endswith(".attn.bias")


def require_nanogpt(model: ModelConfig) -> None:
    """Refuse a network that nanoGPT does not have.

    Raises:
        ConfigError: With the keys that stand in the way.
    """
    qkv_bias = model.bias if model.qkv_bias is None else model.qkv_bias
    keys: dict[str, tuple[object, ...]] = {
        "model.norm": (model.norm, "layernorm"),
        "model.norm_eps": (model.norm_eps, 1e-5),
        "model.position": (model.position, "learned"),
        "model.mlp": (model.mlp, "gelu", "gelu_erf"),
        "model.n_inner": (model.mlp_width, 4 * model.n_embd),
        "model.n_kv_head": (model.n_kv_head or model.n_head, model.n_head),
        "model.head_dim": (model.head_size * model.n_head, model.n_embd),
        "model.qk_norm": (model.qk_norm, False),
        "model.qkv_bias": (qkv_bias, model.bias),
        "model.tie_embeddings": (model.tie_embeddings, True),
    }
    wrong = [
        f"{key}={str(value).lower()}" for key, (value, *fit) in keys.items() if value not in fit
    ]
    if wrong:
        raise ConfigError(
            f"nanoGPT's format does not hold this network: {', '.join(wrong)}",
            "--to hf holds more kinds of networks",
        )


def nanogpt_content(
    ours: dict[str, Tensor], model: ModelConfig, step: int, best_loss: float | None
) -> dict[str, Any]:
    """Return what nanoGPT's `torch.save` writes, with the state of an optimizer that has not begun.

    Args:
        ours: Weights by our names, a tied head left out.
        model: Their network.
        step: Becomes `iter_num`.
        best_loss: Becomes `best_val_loss`.
    """
    args = {key: getattr(model, key) for key in sorted(_ARGS)}
    theirs = to_format(ours, NANOGPT, model)
    theirs["lm_head.weight"] = theirs["transformer.wte.weight"]
    # nanoGPT's groups: matrices, which decay, then vectors; resuming asks for as many of each.
    parameters = [torch.nn.Parameter(weight) for weight in ours.values()]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95))
    return {
        "model": theirs,
        "optimizer": optimizer.state_dict(),
        "model_args": args,
        "iter_num": step,
        "best_val_loss": torch.tensor(1e9 if best_loss is None else best_loss),
        "config": {},
    }
