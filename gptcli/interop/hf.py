"""`--to hf`: a folder that transformers loads, with a model card."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from gptcli import __version__
from gptcli.checkpoint import TrainedModel
from gptcli.config.model import ModelConfig
from gptcli.data.archives import shown
from gptcli.errors import CheckpointError
from gptcli.interop.hf_config import family_of, table_of, to_hugging_face
from gptcli.interop.hf_tokenizer import tokenizer_config, tokenizer_json
from gptcli.interop.hf_weights import CONFIG, TOKENIZER, WEIGHTS, open_folder
from gptcli.interop.names import to_format
from gptcli.interop.weights import Form, Source
from gptcli.runs.read import read_run
from gptcli.tokenizers import Message, Tokenizer, encode_conversation
from gptcli.tokenizers.bpe import END_OF_TEXT

_PROBES = (
    "To be, or not  to be:\n\n\tthat's 12345 questions. ",
    " cafe\u0301 naïve Ⅷ 日本語 🙂 ",
    END_OF_TEXT,
)
_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [{family}, gptcli]
---

# {name}

A {family} model of {count:,} parameters, {made}.

| | |
|---|---|
{table}

Losses are in nats per token. {start}
"""
_TEXT_START = (
    "Every document begins with `<|endoftext|>`, which is also what to start from without a prompt."
)
_CHAT_START = "It answers conversations in ChatML; `apply_chat_template` renders them."


def check(trained: TrainedModel, out: Path) -> Form:
    """Return the model's form there; a ConfigError if no family can hold it."""
    family = family_of(trained.model.config)
    # From 5.12 on transformers splits the text of every model_type qwen2 itself, whatever its
    # tokenizer files say. A Llama with biases in attention is the same model.
    return Form("llama" if family == "qwen2" else family, is_folder=True)


def write(folder: Path, source: Source) -> int:
    """Write all files, have transformers read the vocabulary; return the number of parameters."""
    trained, tokenizer, family = source.trained, source.trained.tokenizer, source.form.family
    config, model = trained.checkpoint.config, source.model
    context = model.trained_context(config["data"].get("seq_len"))
    weights = source.with_biases()
    n_parameters = sum(weight.numel() for weight in weights.values())
    folder.mkdir()
    for file, content in {
        CONFIG: to_hugging_face(model, family, tokenizer.vocab_size, tokenizer.eot),
        "generation_config.json": _generation(config["generate"], context, tokenizer),
        TOKENIZER: tokenizer_json(tokenizer),
        "tokenizer_config.json": tokenizer_config(tokenizer, context),
    }.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (folder / file).write_text(text, encoding="utf-8", newline="\n")
    card = model_card(trained, family, n_parameters, shown(source.out.name))
    (folder / "README.md").write_text(card, encoding="utf-8", newline="\n")
    tensors = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in to_format(weights, table_of(family), model).items()
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    require_same_ids(folder, tokenizer)
    return n_parameters


def read_back(folder: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the model's shape and its weights by our names."""
    pretrained = open_folder(folder, str(folder))
    return pretrained.model, pretrained.weights()


def _generation(generate: dict[str, Any], context: int, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return `generation_config.json`: the run's sampling, up to the end of the context."""
    # transformers lets no context slide: beyond it learned positions are an IndexError there.
    eot, ends = tokenizer.eot, [tokenizer.eot, tokenizer.chat.end] if tokenizer.chat else None
    content = {"bos_token_id": eot, "eos_token_id": ends or eot, "pad_token_id": eot,
               "max_length": context}  # fmt: skip
    if not generate["temperature"]:
        return content | {"do_sample": False}
    content |= {"do_sample": True, "temperature": generate["temperature"]}
    content["top_k"] = generate["top_k"] or 0  # left out, transformers would take 50
    return content | {key: generate[key] for key in ("top_p", "min_p") if generate[key] is not None}


def require_same_ids(folder: Path, tokenizer: Tokenizer) -> None:
    """Have transformers, where it is installed, encode a few texts.

    Raises:
        CheckpointError: The ids of one differ from the tokenizer's.
    """
    try:
        from transformers import AutoTokenizer, __version__
    except ImportError:
        return
    alphabet = tokenizer.definition()["alphabet"] if tokenizer.name == "char" else None
    hint = "install the version of transformers that constraints.txt names, and export again"
    try:
        theirs = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # of any kind: other versions raise others
        reason = f"transformers {__version__} does not read the vocabulary ({str(error)[:100]})"
        raise CheckpointError(reason, hint) from error
    for text in _PROBES:
        if alphabet is not None:
            text = "".join(char for char in text if char in alphabet)
        ids = theirs.encode(text, verbose=False, split_special_tokens=True)
        ours = tokenizer.encode(text).tolist()
        if tokenizer.chat is not None and text != END_OF_TEXT:
            said = [{"role": "user", "content": text}]
            ids = theirs.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
            asked = encode_conversation(tokenizer, [Message("user", text)], reply=True)
            ours = asked[0].tolist()
        if ids != ours:
            raise CheckpointError(
                f"transformers {__version__} reads {text!r} with other ids than the tokenizer"
                f" {tokenizer.name!r}",
                hint,
            )


def model_card(trained: TrainedModel, family: str, n_parameters: int, name: str) -> str:
    """Return the content of `README.md`: what the model is, what it read, how well it predicts."""
    stored = trained.checkpoint
    made = f"trained with gptcli {__version__}" if stored.data else "with its original weights"
    origin = stored.state.get("origin") or {"init_from": "random weights"}
    rows = {
        "started from": origin["init_from"] + _revision(origin),
        "tokenizer": f"{trained.tokenizer.name}, {trained.tokenizer.vocab_size:,} tokens",
    }
    if data := stored.data:
        train, optim = stored.config["train"], stored.config["optim"]
        per_step, source = int(train["tokens_per_step"]), data.get("source")
        text = source if isinstance(source, str) else json.dumps(source)
        rows |= {
            "data": text + _revision(data),
            "training tokens there": f"{data['tokens']['train']:,}",
            "steps": f"{trained.step:,} of {per_step:,} tokens, {trained.step * per_step:,} in all",
            "optimizer": f"{optim['name']}, peak learning rate {optim['lr']:g},"
            f" {optim['schedule']} schedule",
            **_losses(trained),
        }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    start = _CHAT_START if trained.tokenizer.chat is not None else _TEXT_START
    return _CARD.format(
        family=family, name=name, count=n_parameters, made=made, table=table, start=start
    )


def _revision(origin: dict[str, Any]) -> str:
    return f" at {origin['revision']}" if origin.get("revision") else ""


def _losses(trained: TrainedModel) -> dict[str, str]:
    """Return the losses of this step, if the run's log is still there, and a better one before."""
    state, losses = trained.checkpoint.state, dict[str, float | None]()
    for folder in trained.path.resolve().parents[:2]:
        for line in read_run(folder).evaluations:
            if line.step == trained.step:
                losses = {"validation loss": line.val_loss, "training loss": line.train_loss}
    best = state.get("best_loss")
    if best is not None and best < (losses.get("validation loss") or math.inf):
        losses[f"best loss so far (step {state['best_step']:,})"] = best
    return {
        key: f"{value:.4f} (perplexity {math.exp(min(value, 700)):,.2f})"
        for key, value in losses.items()
        if value is not None
    }
