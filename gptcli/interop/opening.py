"""What `model.init_from` names: a model of the Hub, a folder, a file, or a run of ours."""

import re
from pathlib import Path
from typing import Any

import torch

from gptcli import durable
from gptcli.checkpoint import FORMAT, find_checkpoint, load_checkpoint, merged, run_named
from gptcli.errors import CheckpointError
from gptcli.interop.hugging_face import CONFIG, GPT2_REVISIONS, open_folder, open_hub
from gptcli.interop.nanogpt import from_nanogpt, is_nanogpt
from gptcli.interop.origin import Origin
from gptcli.interop.vocabulary import vocabulary_of
from gptcli.tokenizers import tokenizer_from

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.pt)")  # org/name, without the hf: it needs


def open_origin(name: str) -> Origin:
    """Open the weights that `model.init_from` names; of the Hub, only the small files are fetched.

    Raises:
        CheckpointError: There are no such weights, or none that can be used.
    """
    if name in GPT2_REVISIONS or name.startswith("hf:"):
        return open_hub(name)
    path, run = Path(name), run_named(name)
    is_our_run = durable.is_file(path / "run.json")
    if durable.is_file(path / CONFIG) and not is_our_run:
        if run is not None:
            raise CheckpointError(
                f"model.init_from: {name} is a run and the folder of a Hugging Face model",
                f"for the run: {run.as_posix()}; for the folder: ./{name}",
            )
        return open_folder(path, name)
    if run is None and path.is_dir() and not is_our_run:
        pickles = sorted(path.glob("*.pt"))
        hint = f"name the file: {pickles[0]}" if pickles else None
        raise CheckpointError(f"{path}: no {CONFIG}, so not a Hugging Face model", hint)
    if path.is_file() and path.suffix == ".safetensors":
        raise CheckpointError(
            f"{path}: tensors without the shape of their network",
            f"name its folder, with {CONFIG} in it",
        )
    try:
        path = find_checkpoint(name)
    except CheckpointError as error:
        kinds = (
            f"scratch, {', '.join(GPT2_REVISIONS)}, hf:org/name, a folder with {CONFIG}, a"
            " nanoGPT ckpt.pt, or a run"
        )
        hint = f"from the Hugging Face Hub: hf:{name}" if _REPOSITORY.fullmatch(name) else kinds
        raise CheckpointError(f"model.init_from: {name}: no such weights", hint) from error
    content = _load(path)
    if is_nanogpt(content):
        return from_nanogpt(content, name, path)
    return _from_ours(name, path)


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        # torch raises a dozen kinds of errors here, each for some way not to be its file.
        raise CheckpointError(
            f"{path}: damaged, or not a checkpoint of {FORMAT.split('-')[0]} or nanoGPT"
            f" ({type(error).__name__})"
        ) from error


def _from_ours(name: str, path: Path) -> Origin:
    checkpoint = load_checkpoint(path, model_only=True)
    try:
        model, weights = merged(checkpoint)
        vocabulary = vocabulary_of(tokenizer_from(checkpoint.tokenizer))
        step = int(checkpoint.state["step"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its configuration makes no network ({error})") from error
    model = model.model_copy(update={"init_from": "scratch"})
    return Origin(name, str(path), f"step {step}", model, vocabulary, lambda: weights)
