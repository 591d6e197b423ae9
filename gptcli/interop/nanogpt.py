"""`--to nanogpt`: a `ckpt.pt`, a dict with `model` and `model_args`; read without running a pickle.

nanoGPT (https://github.com/karpathy/nanoGPT) computes the exact GELU, GPT-2 the one by tanh.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from gptcli.checkpoint import TrainedModel
from gptcli.config.model import ModelConfig
from gptcli.errors import CheckpointError, ConfigError
from gptcli.interop.hf_config import differing
from gptcli.interop.hf_tokenizer import vocabulary_of
from gptcli.interop.hf_weights import assumed_vocabulary
from gptcli.interop.names import NANOGPT, from_format, to_format
from gptcli.interop.weights import Form, Pretrained, Source, require_shapes
from gptcli.tokenizers import CharTokenizer

_ARGS = {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}
_NOT_SHAPE = {"init_from", "init_std", "zero_init", "zero_init_head", "lora", "rope_theta"}
_COMPILED = "_orig_mod."


def is_nanogpt(content: Any) -> bool:
    """Tell whether a loaded file is a checkpoint of nanoGPT."""
    return isinstance(content, dict) and {"model", "model_args"} <= content.keys()


def from_nanogpt(content: dict[str, Any], name: str, path: Path) -> Pretrained:
    """Open the content of a `ckpt.pt`.

    Raises:
        CheckpointError: Damaged, or of a model that nanoGPT itself does not have.
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


def check(trained: TrainedModel, out: Path) -> Form:
    """Return the model's form there; a ConfigError names the keys that nanoGPT does not have."""
    model, tokenizer = trained.model.config, trained.tokenizer
    args: dict[str, Any] = {key: getattr(model, key) for key in _ARGS}
    args["mlp"] = "gelu" if model.mlp == "gelu" else "gelu_erf"
    theirs = dict(ModelConfig.model_construct(**args).resolved())
    theirs["head_dim"] = model.n_embd / model.n_head
    wrong = differing(model, {key: (theirs[key],) for key in theirs if key not in _NOT_SHAPE})
    if wrong:
        raise ConfigError(
            f"nanoGPT's format does not hold this model: {', '.join(wrong.values())}",
            "--to hf holds more kinds of models",
        )
    if tokenizer.chat is not None:
        raise ConfigError(
            "nanoGPT's format does not hold this model: it has no chat tokens",
            "--to hf and --to gguf hold models that chat",
        )
    is_exact, beside, notes = model.mlp == "gelu_erf", None, []
    if not is_exact:
        notes.append("nanoGPT computes the exact GELU, this model the one by tanh")
    if isinstance(tokenizer, CharTokenizer):
        beside = out.absolute().parent / "meta.pkl"
        folder = beside.parent.name
        notes.append(
            f"the characters are in {beside}; nanoGPT's sample.py --out_dir={folder} reads"
            f" them where {folder} is in nanoGPT's own folder"
        )
    elif tokenizer.name != "gpt2":
        notes.append(
            f"nanoGPT has no place for the {tokenizer.name} vocabulary: its sample.py takes the ids"
            " for GPT-2's, and prints other text than `gpt generate`"
        )
    return Form("gpt2", tuple(notes), is_exact, beside=beside)


def write(path: Path, source: Source) -> int:
    """Write what nanoGPT's train.py saves, before the first step of its optimizer.

    Returns:
        The number of parameters.
    """
    model, weights, state = source.model, source.weights, source.trained.checkpoint.state
    theirs = to_format(weights, NANOGPT, model)
    theirs["lm_head.weight"] = theirs["transformer.wte.weight"]
    # nanoGPT's groups: matrices, which decay, then vectors; resuming asks for as many of each.
    parameters = [torch.nn.Parameter(weight) for weight in weights.values()]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95))
    best_loss = state.get("best_loss")
    # sample.py looks for data/<dataset>/meta.pkl, which lies beside the checkpoint.
    beside = source.form.beside
    dataset = {"dataset": f"../{beside.parent.name}"} if beside else {}
    content = {
        "model": theirs,
        "optimizer": optimizer.state_dict(),
        "model_args": {key: getattr(model, key) for key in sorted(_ARGS)},
        "iter_num": source.trained.step,
        "best_val_loss": torch.tensor(1e9 if best_loss is None else best_loss),
        "config": dataset,
    }
    with path.open("wb") as file:
        torch.save(content, file)  # into an open file: no name troubles it
    if beside is not None:
        stoi = vocabulary_of(source.trained.tokenizer)
        itos = {id: char for char, id in stoi.items()}
        meta = pickle.dumps({"vocab_size": len(stoi), "stoi": stoi, "itos": itos})
        path.with_name(beside.name).write_bytes(meta)
    return sum(weight.numel() for weight in weights.values())


def read_back(path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the model's shape and its weights by our names."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    pretrained = from_nanogpt(content, str(path), path)
    return pretrained.model, pretrained.weights()
