"""What `model.init_from` and `--checkpoint` name: a run of ours, a file, a folder, the Hub."""

import re
from pathlib import Path
from typing import Any, NoReturn

import torch

from gptcli import atomic
from gptcli.checkpoint import (
    FORMAT,
    Checkpoint,
    TrainedModel,
    load_checkpoint,
    load_model,
    merged,
    place_weights,
)
from gptcli.config import Config
from gptcli.data.shards import read_manifest, read_tokenizer
from gptcli.errors import CheckpointError, ConfigError, is_out_of_memory
from gptcli.interop.hf_tokenizer import vocabulary_of
from gptcli.interop.hf_weights import CONFIG, GPT2_REVISIONS, open_folder, open_hub
from gptcli.interop.nanogpt import from_nanogpt, is_nanogpt
from gptcli.interop.weights import Pretrained, resize_vocab
from gptcli.model import GPT
from gptcli.runs import BEST, LAST, RUN, find_checkpoint, run_named
from gptcli.tokenizers import Tokenizer, make_tokenizer, tokenizer_from

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.pt)")  # org/name, without the hf: it needs
_KINDS = f"{', '.join(GPT2_REVISIONS)}, hf:org/name, a folder with {CONFIG}, or a nanoGPT ckpt.pt"

_MOST_ADDED = 1024  # tokens that a tokenizer may have beyond the rows of its model


def open_pretrained(name: str) -> Pretrained:
    """Open the weights that `model.init_from` names; of the Hub, only the small files are fetched.

    Raises:
        CheckpointError: There are no such weights, or none that can be used.
    """
    if name in GPT2_REVISIONS or name.startswith("hf:"):
        return open_hub(name)
    path, run = Path(name), run_named(name)
    is_our_run = atomic.is_file(path / RUN)
    if atomic.is_file(path / CONFIG) and not is_our_run:
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
        kinds = f"scratch, a run, {_KINDS}"
        hint = _from_hub(name) or kinds
        raise CheckpointError(f"model.init_from: {name}: no such weights", hint) from error
    content = _load(path)
    if is_nanogpt(content):
        return from_nanogpt(content, name, path)
    return _from_ours(name, path)


def _from_hub(name: str) -> str | None:
    """Return the hint for `org/name` without the `hf:` that it needs."""
    if not _REPOSITORY.fullmatch(name) or Path(name).parent.is_dir():
        return None
    return f"from the Hugging Face Hub: hf:{name}"


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        # torch raises a dozen kinds of errors here, each for some way not to be its file.
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            f"{path}: damaged, or not a checkpoint of {FORMAT.split('-')[0]} or nanoGPT"
            f" ({type(error).__name__})"
        ) from error


def _from_ours(name: str, path: Path) -> Pretrained:
    checkpoint = load_checkpoint(path, model_only=True)
    try:
        model, weights = merged(checkpoint)
        tokenizer = tokenizer_from(checkpoint.tokenizer)
        vocabulary = vocabulary_of(tokenizer)
        step = int(checkpoint.state["step"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: its configuration is not a valid model ({error})"
        ) from error
    model = model.model_copy(update={"init_from": "scratch"})
    return Pretrained(
        name, str(path), f"step {step}", model, vocabulary, lambda: tokenizer, lambda: weights
    )


def open_model(
    name: str | None,
    config: Config,
    device: torch.device,
    data: Path | None = None,
    *,
    whole: bool = False,
) -> TrainedModel:
    """Load what `--checkpoint` names, in evaluation mode.

    A run or a checkpoint of ours comes first, then the weights of other programs.

    Args:
        name: As for `find_checkpoint`, or as `model.init_from` has it.
        config: The configuration given beside it, with a tokenizer for weights that have none.
        device: Where to.
        data: Prepared data that the weights of another program are to be scored on.
        whole: As for `load_model`.

    Raises:
        CheckpointError: There is no such model, or it cannot be used.
        ConfigError: Nothing says which tokens it has, or it has others than `data`.
    """
    try:
        path = find_checkpoint(name, config)
    except CheckpointError as error:
        if name is None or not _is_foreign(name):
            is_name = error.hint and name not in (None, BEST, LAST)
            hint = f"{error.hint}; or name {_KINDS}" if is_name else error.hint
            raise CheckpointError(error.message, _from_hub(name or "") or hint) from error
        return _of_others(open_pretrained(name), config, device, data)
    if path.suffix != ".safetensors" and not is_nanogpt(_peek(path)):
        return load_model(path, device, whole=whole)
    return _of_others(open_pretrained(str(path)), config, device, data)


def _is_foreign(name: str) -> bool:
    if name in GPT2_REVISIONS or name.startswith("hf:"):
        return True
    return atomic.is_folder(Path(name)) and not atomic.is_file(Path(name) / RUN)


def _peek(path: Path) -> Any:
    """Return the content of a file that torch can load, else None: it is looked at again later."""
    try:
        return _load(path)
    except CheckpointError:
        return None


def _of_others(
    origin: Pretrained, config: Config, device: torch.device, data: Path | None
) -> TrainedModel:
    """Make the network and the tokenizer of weights that another program wrote."""
    tokenizer = _tokenizer_of(origin, config, data)
    n_rows = origin.model.vocab_size or 0
    shape = origin.model.model_copy(update={"vocab_size": max(n_rows, tokenizer.vocab_size)})
    weights = resize_vocab(origin.weights(), shape)
    with torch.device("meta"):
        model = GPT(shape)
    place = Path(origin.name)
    place_weights(model, weights, place, device)
    model.n_tokens = min(n_rows, tokenizer.vocab_size)
    settings = Config().model_dump() | {"model": shape.model_dump()}
    state = {"step": 0, "origin": origin.facts()}
    checkpoint = Checkpoint({}, {}, settings, tokenizer.definition(), {}, state)
    return TrainedModel(place, model.eval(), tokenizer, checkpoint)


def _tokenizer_of(origin: Pretrained, config: Config, data: Path | None) -> Tokenizer:
    """Return the tokenizer of `data`, of the settings or of the weights, whichever there is."""
    n_rows = origin.model.vocab_size or 0
    if data is not None:
        tokenizer = read_tokenizer(data, read_manifest(data))
    elif config.tokenizer.model_fields_set:
        tokenizer = make_tokenizer(config.tokenizer, _no_text)
    elif origin.tokenizer is not None:
        tokenizer = origin.tokenizer()
        if tokenizer.vocab_size > n_rows + _MOST_ADDED:
            raise CheckpointError(
                f"{origin.place}: its tokenizer has ids up to {tokenizer.vocab_size:,}, the model"
                f" {n_rows:,} rows"
            )
        return tokenizer
    else:
        raise ConfigError(
            f"{origin.name}: its files do not say what its {n_rows:,} ids stand for",
            "add the folder of its prepared data, -s tokenizer.path=DIR; for nanoGPT's characters,"
            " -s tokenizer.name=char -s tokenizer.path=input.txt",
        )
    origin.require_tokenizer(tokenizer)
    if tokenizer.vocab_size > (origin.shape_for(tokenizer).vocab_size or 0):
        raise ConfigError(
            f"{origin.name} has {n_rows:,} ids, too few for the {tokenizer.vocab_size:,} tokens of"
            f" the '{tokenizer.name}' tokenizer",
            "name the tokenizer it was trained with",
        )
    return tokenizer


def _no_text() -> NoReturn:
    raise ConfigError(
        "tokenizer.path is missing: there is no text here to learn a vocabulary from",
        "-s tokenizer.path=DIR names prepared data, -s tokenizer.path=input.txt its characters",
    )
