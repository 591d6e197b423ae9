"""What `model.init_from` and `--checkpoint` name: a run of ours, a file, a folder, the Hub."""

import contextlib
import re
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch

from gptcli import atomic
from gptcli.checkpoint import (
    Checkpoint,
    TrainedModel,
    load_checkpoint,
    load_model,
    merged,
    place_weights,
    read_file,
)
from gptcli.config import Config
from gptcli.data.shards import read_manifest, read_tokenizer
from gptcli.errors import CheckpointError, ConfigError
from gptcli.interop.hf_tokenizer import vocabulary_of
from gptcli.interop.hf_weights import CONFIG, GPT2_REVISIONS, open_folder, open_hub
from gptcli.interop.nanogpt import from_nanogpt, is_nanogpt
from gptcli.interop.weights import Pretrained, add_tokens, resize_vocab
from gptcli.model import GPT
from gptcli.runs import BEST, LAST, RUN
from gptcli.runs.find import find_checkpoint, run_named
from gptcli.tokenizers import Tokenizer, make_tokenizer, tokenizer_from

_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*(?<!\.pt)")  # org/name, without the hf: it needs
_KINDS = f"{', '.join(GPT2_REVISIONS)}, hf:org/name, a folder with {CONFIG}, or a nanoGPT ckpt.pt"
_MAX_ADDED = 1024  # tokens that a tokenizer may have beyond the rows of its model


def open_pretrained(name: str) -> Pretrained:
    """Open the weights that `model.init_from` names; of the Hub, only the small files are fetched.

    Raises:
        CheckpointError: There are no such weights, or none that can be used.
    """
    if _is_on_hub(name):
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
            f"{path}: tensors without the shape of their model",
            f"name its folder, with {CONFIG} in it",
        )
    try:
        path = find_checkpoint(name)
    except CheckpointError as error:
        hint = _hub_hint(name) or f"scratch, a run, {_KINDS}"
        raise CheckpointError(f"model.init_from: {name}: no such weights", hint) from error
    content = read_file(path, "gptcli or nanoGPT")
    return from_nanogpt(content, name, path) if is_nanogpt(content) else _from_ours(name, path)


def _is_on_hub(name: str) -> bool:
    return name in GPT2_REVISIONS or name.startswith("hf:")


def _hub_hint(name: str) -> str | None:
    """Return the hint for `org/name` without the `hf:` that it needs."""
    if not _REPOSITORY.fullmatch(name) or Path(name).parent.is_dir():
        return None
    return f"from the Hugging Face Hub: hf:{name}"


def _from_ours(name: str, path: Path) -> Pretrained:
    checkpoint = load_checkpoint(path, model_only=True)
    try:
        model, weights = merged(checkpoint)
        tokenizer = tokenizer_from(checkpoint.tokenizer)
        known = vocabulary_of(tokenizer), lambda: tokenizer
        revision = f"step {int(checkpoint.state['step'])}"
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: its configuration is not a valid model ({error})"
        ) from error
    model = model.model_copy(update={"init_from": "scratch"})
    parts = checkpoint.data.get("parts") or {"": checkpoint.data}  # the first has the vocabulary
    data = next(iter(parts.values())).get("dir")
    return Pretrained(name, str(path), revision, model, *known, lambda: weights, data)


def open_model(
    name: str | None,
    config: Config,
    device: torch.device,
    data: Path | None = None,
    *,
    whole: bool = False,
) -> TrainedModel:
    """Load what `--checkpoint` names, in evaluation mode.

    A run or a checkpoint of ours comes first, then the weights of other programs, whose tokenizer
    is that of `data`, of `config`, or their own. `whole` is for `load_model`.

    Raises:
        CheckpointError: There is no such model, or it cannot be used.
        ConfigError: Nothing says which tokens it has, or it has others than `data`.
    """
    try:
        path = find_checkpoint(name, config)
    except CheckpointError as error:
        folder = Path(name or "")
        is_foreign = atomic.is_folder(folder) and not atomic.is_file(folder / RUN)
        if name is None or not (is_foreign or _is_on_hub(name)):
            hint = error.hint
            if hint and name not in (None, BEST, LAST):
                hint = f"{hint}; or name {_KINDS}"
            raise CheckpointError(error.message, _hub_hint(name or "") or hint) from error
        return _of_others(open_pretrained(name), config, device, data)
    if path.suffix != ".safetensors":
        try:
            return load_model(path, device, whole=whole)
        except CheckpointError:
            content = None
            with contextlib.suppress(CheckpointError):  # the first one says more of a damaged file
                content = read_file(path)
            if not is_nanogpt(content):
                raise
    return _of_others(open_pretrained(str(path)), config, device, data)


def _of_others(
    pretrained: Pretrained, config: Config, device: torch.device, data: Path | None
) -> TrainedModel:
    """Make the model and the tokenizer of weights that another program wrote."""
    tokenizer = _tokenizer_of(pretrained, config, data)
    n_rows = pretrained.model.vocab_size or 0
    shape = pretrained.model.model_copy(update={"vocab_size": max(n_rows, tokenizer.vocab_size)})
    weights = resize_vocab(pretrained.weights(), shape)
    with torch.device("meta"):
        model = GPT(shape, min(n_rows, tokenizer.vocab_size))
    place = Path(pretrained.name)
    place_weights(model, weights, place, device)
    settings = Config().model_dump() | {"model": shape.model_dump()}
    state = {"step": 0, "origin": pretrained.facts()}
    checkpoint = Checkpoint({}, {}, settings, tokenizer.definition(), {}, state)
    return TrainedModel(place, model.eval(), tokenizer, checkpoint)


def with_tokenizer(trained: TrainedModel, tokenizer: Tokenizer) -> TrainedModel:
    """Return a model with rows for the tokens that a tokenizer adds to its own."""
    n_known, n_tokens = trained.tokenizer.vocab_size, tokenizer.vocab_size
    config = trained.model.config
    shape = config.model_copy(update={"vocab_size": max(config.vocab_size or 0, n_tokens)})
    parameters = dict(trained.model.named_parameters())
    with torch.device("meta"):
        model = GPT(shape, n_tokens)
    weights = add_tokens(parameters, shape, range(n_known, n_tokens), seed=0)
    place_weights(model, weights, trained.path, trained.model.wte.weight.device)
    return replace(trained, model=model.eval(), tokenizer=tokenizer)


def _tokenizer_of(pretrained: Pretrained, config: Config, data: Path | None) -> Tokenizer:
    """Return the tokenizer of `data`, of the settings or of the weights, whichever there is."""
    n_rows = pretrained.model.vocab_size or 0
    if data is not None:
        tokenizer = read_tokenizer(data, read_manifest(data))
    elif config.tokenizer.model_fields_set:
        tokenizer = make_tokenizer(config.tokenizer, _no_text)
    elif pretrained.tokenizer is not None:
        tokenizer = pretrained.tokenizer()
        if tokenizer.vocab_size > n_rows + _MAX_ADDED:
            raise CheckpointError(
                f"{pretrained.place}: its tokenizer has ids up to {tokenizer.vocab_size:,}, the"
                f" model {n_rows:,} rows"
            )
        return tokenizer
    else:
        raise ConfigError(
            f"{pretrained.name}: its files do not say what its {n_rows:,} ids mean",
            "add the folder of its prepared data, -s tokenizer.path=DIR; for nanoGPT's characters,"
            " -s tokenizer.name=char -s tokenizer.path=input.txt",
        )
    pretrained.require_tokenizer(tokenizer)
    if tokenizer.vocab_size > (pretrained.shape_for(tokenizer).vocab_size or 0):
        raise ConfigError(
            f"{pretrained.name} has {n_rows:,} ids, too few for the {tokenizer.vocab_size:,} tokens"
            f" of the '{tokenizer.name}' tokenizer",
            "name the tokenizer it was trained with",
        )
    return tokenizer


def _no_text() -> NoReturn:
    raise ConfigError(
        "tokenizer.path is missing: there is no text here to learn a vocabulary from",
        "-s tokenizer.path=DIR names prepared data, -s tokenizer.path=input.txt its characters",
    )
