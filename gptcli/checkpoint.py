"""Checkpoints: one file each, written atomically and verified when read.

A file holds tensors and plain types only, loads with `weights_only=True`, and is enough to resume.
A sha256 of every tensor and one over the rest are compared with what was loaded: a zip's own sums
miss damage that changes where a tensor is read from.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptcli import atomic
from gptcli.config.model import ModelConfig
from gptcli.errors import CheckpointError, ConfigError, DataError, GptError, is_out_of_memory
from gptcli.model import GPT
from gptcli.tokenizers import Tokenizer, tokenizer_from

FORMAT = "gptcli-checkpoint"
VERSION = 1
BASE = "base.pt"  # the frozen weights of a run that learns adapters
_OLDER = "use an older checkpoint of the run (checkpoints/step-*.pt)"
_NAME_DATA = "name prepared data with --data DIR, or a file with --text FILE"
_FOREIGN = "was it written by another program, or a newer gptcli?"


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        model: Weights by GPT-2's names; a tied head is not repeated. A run that learns adapters
            writes only these; `state` then names the base that they are read with.
        optimizer: State of each parameter, by parameter name.
        config: The resolved configuration of the run.
        tokenizer: `Tokenizer.definition()`.
        state: Position and sums of the run.
    """

    model: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    config: dict[str, Any]
    tokenizer: dict[str, Any]
    data: dict[str, Any]
    state: dict[str, Any]


_FIELDS = [field.name for field in fields(Checkpoint)]
_PLAIN = ["format", "version", *(name for name in _FIELDS if name not in ("model", "optimizer"))]


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> str:
    """Write a checkpoint, all of it or not at all, and return a checksum of its weights.

    Raises:
        StorageError: The disk is full or may not be written.
    """
    content: dict[str, Any] = {"format": FORMAT, "version": VERSION}
    content |= {name: getattr(checkpoint, name) for name in _FIELDS}
    content["model"] = _on_cpu(checkpoint.model)
    content["optimizer"] = {name: _on_cpu(state) for name, state in checkpoint.optimizer.items()}
    tensors = {name: _tensor_sum(tensor) for name, tensor in _tensors(content).items()}
    content["checksums"] = {"tensors": tensors, "rest": _rest_sum(content)}
    with atomic.atomic_write(path) as file:
        torch.save(content, file)
    return _weights_sum(tensors)


def _on_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def load_checkpoint(path: Path, *, model_only: bool = False) -> Checkpoint:
    """Read and verify a checkpoint; one of adapters is completed by the base of its run.

    With `model_only` the optimizer's tensors are not verified; the file is mapped, so they are not
    read either.

    Raises:
        CheckpointError: Missing, not one of ours, or damaged; so is the base.
    """
    checkpoint, _ = _load(path, model_only)
    base_sum = checkpoint.state.get("base")
    if not base_sum:
        return checkpoint
    places = [folder / BASE for folder in path.resolve().parents[:2]]
    place = next((place for place in places if place.is_file()), None)
    if place is None:
        raise CheckpointError(
            f"{path} holds adapters only; the weights they belong to, {places[0]}, are missing",
            f"copy {BASE} from the run's folder too, or `gpt export` a merged model",
        )
    base, weights_sum = _load(place, model_only=True)
    if weights_sum != base_sum:
        raise CheckpointError(f"{place}: not the weights that the adapters in {path} belong to")
    return replace(checkpoint, model=base.model | checkpoint.model)


def read_file(path: Path, programs: str = "gptcli") -> Any:
    """Return the content of a file that torch wrote; it is mapped, and no code in it is run.

    Raises:
        CheckpointError: There is no such file, or it is not one of these programs.
    """
    if not atomic.is_file(path):
        what = "is not a file" if os.path.lexists(path) else "no such checkpoint"
        raise CheckpointError(f"{path}: {what}")
    try:
        with atomic.held(path) as name:  # torch opens it twice, for names and for numbers
            return torch.load(name, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        # torch raises a dozen kinds of errors here, each for some way not to be its file.
        if is_out_of_memory(error):
            raise
        if isinstance(error, OSError):
            raise CheckpointError(f"{path}: {error.strerror or error}") from error
        raise CheckpointError(
            f"{path}: damaged, or not a checkpoint of {programs} ({type(error).__name__})",
            "checkpoints are runs/<name>/best.pt, last.pt and checkpoints/step-*.pt",
        ) from error


def _load(path: Path, model_only: bool) -> tuple[Checkpoint, str]:
    """Read and verify one file; return the checksum of its weights too."""
    content = read_file(path)
    try:
        _verify(content, model_only)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error.message}", error.hint) from error
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"{path}: damaged ({type(error).__name__}: {error})") from error
    checkpoint = Checkpoint(**{name: content[name] for name in _FIELDS})
    return checkpoint, _weights_sum(content["checksums"]["tensors"])


def _verify(content: Any, model_only: bool) -> None:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError("not a checkpoint of gptcli", _FOREIGN)
    if content.get("version") != VERSION:
        raise CheckpointError(f"format version {content.get('version')}, not {VERSION}", _FOREIGN)
    if set(content) != {"format", "version", "checksums", *_FIELDS}:
        raise CheckpointError("damaged: keys are missing", _OLDER)
    sums = content["checksums"]
    if _rest_sum(content) != sums["rest"]:
        raise CheckpointError("damaged: its settings do not match their checksum", _OLDER)
    tensors = {
        name: tensor
        for name, tensor in _tensors(content).items()
        if name.startswith("model/") or not model_only
    }
    with ThreadPoolExecutor(4) as pool:  # sums are taken outside the interpreter's lock
        for name, actual in zip(tensors, pool.map(_tensor_sum, tensors.values()), strict=True):
            if actual != sums["tensors"].get(name):
                raise CheckpointError(f"damaged: tensor {name} does not match its checksum", _OLDER)


def _tensors(content: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors = {f"model/{name}": tensor for name, tensor in content["model"].items()}
    for name, state in content["optimizer"].items():
        tensors |= {f"optimizer/{name}/{key}": tensor for key, tensor in state.items()}
    if not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise CheckpointError("damaged: tensors are missing", _OLDER)
    return tensors


def _tensor_sum(tensor: Tensor) -> str:
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()


def _weights_sum(sums: Mapping[str, str]) -> str:
    weights = {name: value for name, value in sums.items() if name.startswith("model/")}
    return hashlib.sha256(json.dumps(weights, sort_keys=True).encode()).hexdigest()


def _rest_sum(content: Mapping[str, Any]) -> str:
    """Sum over everything but the tensors' elements: settings, names, types and shapes."""
    tensors = {name: [str(t.dtype), *t.shape] for name, t in _tensors(content).items()}
    canonical = json.dumps([{key: content[key] for key in _PLAIN}, tensors], sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True)
class TrainedModel:
    """A model ready to use, with its checkpoint."""

    path: Path
    model: GPT
    tokenizer: Tokenizer
    checkpoint: Checkpoint

    @property
    def step(self) -> int:
        """Optimizer steps the model was trained for."""
        return int(self.checkpoint.state["step"])

    @property
    def is_cut(self) -> bool:
        """Whether positions that were never trained are left out."""
        block_size: int = self.checkpoint.config["model"]["block_size"]
        return self.model.config.block_size < block_size

    @property
    def sources(self) -> dict[str, float]:
        """The sources of the mixture it was trained on, with their weights at the run's end."""
        parts = self.checkpoint.data.get("parts", {})
        return {name: facts["weight"] for name, facts in parts.items()}

    def data_of(self, source: str | None = None) -> Path:
        """Return the folder of what it was trained on, here or where its run was started.

        Args:
            source: Of a mixture, the name of the source.

        Raises:
            ConfigError: There is no such source, or there are several and none is named.
            DataError: It is in neither place.
        """
        data, names = self.checkpoint.data, ", ".join(self.sources)
        if source is not None and source not in self.sources:
            hint = f"its sources: {names}" if names else "leave out --source"
            raise ConfigError(f"{self.path}: not trained on a source named '{source}'", hint)
        if source is None and names:
            raise ConfigError(f"{self.path}: trained on several sources",
                              f"name one with --source: {names}")  # fmt: skip
        named: str | None = data["parts"][source]["dir"] if source is not None else data.get("dir")
        if named is None:
            raise DataError(f"{self.path}: there is no data that belongs to this model", _NAME_DATA)
        return self._place(named)

    def _place(self, named: str) -> Path:
        """Return a data folder, here or where the run was started."""
        # The run was started where its folder, without the run_dir that it ends in, leads to.
        parts = Path(self.checkpoint.config.get("run_dir") or "").parts
        started_in = [
            folder.parents[len(parts) - 1]
            for folder in self.path.resolve().parents[:2]
            if 0 < len(parts) < len(folder.parts) and folder.parts[-len(parts) :] == parts
        ]
        for place in (Path(), *started_in):
            if (place / named).is_dir():
                return place / named
        raise DataError(f"{named}: the data of {self.path} is not here", _NAME_DATA)


def load_model(path: Path, device: torch.device, *, whole: bool = False) -> TrainedModel:
    """Load the model and the tokenizer of a checkpoint, in evaluation mode.

    Positions that were never trained, because rows were shorter than the context, are left out
    unless `whole`.

    Raises:
        CheckpointError: Missing, damaged, or not of this model.
    """
    checkpoint = load_checkpoint(path, model_only=True)
    try:
        shape, weights = merged(checkpoint)
        context = shape.trained_context(checkpoint.config["data"].get("seq_len"))
        if context < shape.block_size and not whole:
            shape = shape.model_copy(update={"block_size": context})
            weights = {**weights, "wpe.weight": weights["wpe.weight"][:context]}
        tokenizer = tokenizer_from(checkpoint.tokenizer)
        with torch.device("meta"):
            model = GPT(shape, tokenizer.vocab_size)
    except (GptError, ValueError, TypeError, KeyError, AssertionError) as error:
        raise CheckpointError(
            f"{path}: its configuration is not a valid model ({error})"
        ) from error
    place_weights(model, weights, path, device)
    return TrainedModel(path, model.eval(), tokenizer, checkpoint)


def merged(checkpoint: Checkpoint) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the shape and the weights of a checkpoint's model, adapters added in."""
    shape = ModelConfig(**checkpoint.config["model"])
    if shape.lora is None:
        return shape, checkpoint.model
    from gptcli.model.lora import merge_adapters  # which few runs have

    weights = merge_adapters(checkpoint.model, shape.lora)
    return shape.model_copy(update={"lora": None}), weights


def load_weights(model: GPT, weights: Mapping[str, Tensor], path: Path) -> None:
    """Copy weights into `model`; a CheckpointError unless its parameters are exactly these."""
    _require_same(model, weights, path)
    model.load_state_dict(weights, strict=False)  # but for a tied head, which is not repeated


def place_weights(
    model: GPT, weights: Mapping[str, Tensor], path: Path, device: torch.device
) -> None:
    """Give `model`, made on "meta", copies of weights as `load_weights` does, not to be trained."""
    _require_same(model, weights, path)
    # Copied, for a mapped file that somebody writes to would change under the model.
    copies = {n: weight.to(device, torch.float32, copy=True) for n, weight in weights.items()}
    model.load_state_dict(copies, strict=False, assign=True)
    model.requires_grad_(False)
    if model.config.tie_embeddings:
        model.lm_head.weight = model.wte.weight


def _require_same(model: GPT, weights: Mapping[str, Tensor], path: Path) -> None:
    parameters = dict(model.named_parameters())
    differing = sorted(parameters.keys() ^ weights.keys()) or [
        name for name, weight in weights.items() if weight.shape != parameters[name].shape
    ]
    if differing:
        raise CheckpointError(f"{path}: weights of another model ({', '.join(differing[:3])})")
