"""Reading Hugging Face folders and Hub repositories: config.json and safetensors, never pickles."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptcli import atomic
from gptcli.config.model import ModelConfig
from gptcli.data.hub import HubFile, MissingFileError
from gptcli.errors import CheckpointError, DataError
from gptcli.interop.hf_config import Family, from_hugging_face, table_of
from gptcli.interop.hf_tokenizer import Vocabulary, vocabulary_of
from gptcli.interop.names import from_format, to_format
from gptcli.interop.weights import Pretrained, our_shapes, require_shapes
from gptcli.tokenizers import Tokenizer, bpe
from gptcli.tokenizers.foreign import ForeignTokenizer

# The commits the names have stood for since the weights became safetensors.
GPT2_REVISIONS = {
    "gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "gpt2-large": "32b71b12589c2f8d625668d2335a01cac3249519",
    "gpt2-xl": "15ea56dee5df4983c59b2538573817e1667135e2",
}
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
TOKENIZER = "tokenizer.json"
_FLOATS = {"F64", "F32", "F16", "BF16"}
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model.pt")


@dataclass(frozen=True)
class _Files:
    """The files of a model by name: `get` fetches one, None if there is none; `has` asks."""

    get: Callable[[str], Path | None]
    has: Callable[[str], bool]


def open_folder(folder: Path, name: str) -> Pretrained:
    """Open a folder that a Hugging Face model was saved in.

    Raises:
        CheckpointError: It holds no such model, or one that is not supported.
    """

    def get(file: str) -> Path | None:
        return folder / file if (folder / file).is_file() else None

    return _open(_Files(get, lambda file: (folder / file).is_file()), name, str(folder), None)


def open_hub(name: str) -> Pretrained:
    """Open `gpt2`, `gpt2-medium`, ..., or `hf:org/name[@revision]`, pinned to a commit.

    Raises:
        CheckpointError: There is no such model, it cannot be reached, or it is not supported.
    """
    if name in GPT2_REVISIONS:
        repository, wanted = f"openai-community/{name}", GPT2_REVISIONS[name]
    else:
        repository, _, wanted = name.removeprefix("hf:").partition("@")
    if repository.count("/") != 1:
        raise CheckpointError(f"{name}: expected hf:org/name[@revision]")
    revision = wanted or "main"

    def named(file: str) -> HubFile:
        return HubFile(repository, file, revision, repo_type="model")

    def get(file: str) -> Path | None:
        try:
            return named(file).fetch()
        except MissingFileError:
            return None
        except DataError as error:
            raise CheckpointError(error.message, error.hint) from error

    def has(file: str) -> bool:
        try:
            return named(file).exists()
        except DataError as error:
            raise CheckpointError(error.message, error.hint) from error

    config = get(CONFIG)
    if config is not None:
        revision = config.parent.name  # the cache keeps files in a folder named by their commit
    return _open(_Files(get, has), name, f"hf:{repository}", revision)


def _open(files: _Files, name: str, place: str, revision: str | None) -> Pretrained:
    path = files.get(CONFIG)
    if path is None:
        raise CheckpointError(f"{place}: no {CONFIG}, so not a Hugging Face model")
    content = _json(path)
    model, family = from_hugging_face(content, f"{place}/{CONFIG}")
    parts = {"attention_bias": ".self_attn.", "mlp_bias": ".mlp."} if family == "llama" else {}
    without = tuple(part for key, part in parts.items() if not content.get(key))

    def weights() -> dict[str, Tensor]:
        return _read(_weight_files(files, place), model, family, without, place)

    vocabulary, tokenizer = _vocabulary(files, name, model.vocab_size, place)
    return Pretrained(name, place, revision, model, vocabulary, tokenizer, weights)


def _vocabulary(
    files: _Files, name: str, n_rows: int | None, place: str
) -> tuple[Vocabulary | None, Callable[[], Tokenizer] | None]:
    """Return the tokens and their ids, and what makes the tokenizer, as far as the files say.

    A GPT-2 that comes without them has GPT-2's.
    """
    if name in GPT2_REVISIONS:
        return assumed_vocabulary(len(bpe.gpt2().ranks) + 1)
    for file in (TOKENIZER, "vocab.json"):
        path = files.get(file)
        if path is None:
            continue
        content = _json(path)
        try:
            found = content if file == "vocab.json" else dict(content["model"]["vocab"])
            added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        except (KeyError, TypeError, ValueError, AttributeError):
            found, added = {}, {}  # a kind of vocabulary without single ids, such as Unigram
        if found | added == vocabulary_of(bpe.gpt2()):
            return found | added, bpe.gpt2
        make = partial(_tokenizer, files, path, place) if file == TOKENIZER else None
        return found | added, make
    return assumed_vocabulary(n_rows)


def _tokenizer(files: _Files, path: Path, place: str) -> Tokenizer:
    """Make the tokenizer of a `tokenizer.json`, and find the ids that end a text."""
    found = None
    for file in ("generation_config.json", CONFIG):
        settings = files.get(file)
        if found is None and settings is not None:
            found = _json(settings).get("eos_token_id")
    ends = [id for id in (found if isinstance(found, list) else [found]) if isinstance(id, int)]
    try:
        return ForeignTokenizer(atomic.read_bytes(path).decode(), ends)
    except (DataError, OSError, ValueError) as error:
        raise CheckpointError(f"{place}/{TOKENIZER}: {error}") from error


def assumed_vocabulary(
    n_rows: int | None,
) -> tuple[Vocabulary | None, Callable[[], Tokenizer] | None]:
    """Return GPT-2's vocabulary for an embedding of its size, padded or not; else none."""
    if not 50257 <= (n_rows or 0) <= 50304:
        return None, None
    return vocabulary_of(bpe.gpt2()), bpe.gpt2


def _weight_files(files: _Files, place: str) -> list[Path]:
    """Return the files of the weights: one, or those that an index lists.

    Raises:
        CheckpointError: There are none, or only pickled ones.
    """
    whole = files.get(WEIGHTS)
    if whole is not None:
        return [whole]
    index = files.get(INDEX)
    if index is None:
        pickled = next((name for name in _PICKLES if files.has(name)), None)
        raise CheckpointError(
            f"{place}: no {WEIGHTS}" + (f", only {pickled}, which may run code" if pickled else ""),
            "convert it to safetensors, or take a revision that has them" if pickled else None,
        )
    try:
        names = sorted(set(_json(index)["weight_map"].values()))
        if not all(Path(name).name == name for name in names):
            raise ValueError("a path")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{place}/{INDEX}: damaged, it lists no files") from error
    paths = [(name, files.get(name)) for name in names]
    missing = [name for name, path in paths if path is None]
    if missing:
        raise CheckpointError(f"{place}: {missing[0]} is missing")
    return [path for _, path in paths if path is not None]


def _read(
    paths: list[Path], model: ModelConfig, family: Family, without: tuple[str, ...], place: str
) -> dict[str, Tensor]:
    """Read weights once the headers of all files have said that they are the network's.

    The biases of the parts that are `without` are zeros.
    """
    table = table_of(family)
    theirs = {
        name: torch.zeros(tensor.shape)
        for name, tensor in to_format(our_shapes(model), table, model).items()
        if name.endswith(".bias") and any(part in name for part in without)
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    spelled: dict[str, tuple[Path, str]] = {}  # our spelling -> where, and how it is written there
    for path in paths:
        with _opened(path, place) as file:
            for written in file.keys():
                header = file.get_slice(written)
                if header.get_dtype() not in _FLOATS:
                    if _is_mask(written):
                        continue
                    raise CheckpointError(
                        f"{place}: tensor {written} is {header.get_dtype()}, not floating point",
                        "quantized weights cannot be trained; take the original ones",
                    )
                name = _prefixed(written, family)
                if name in theirs:
                    raise CheckpointError(f"{place}: tensor {written} contradicts {CONFIG}")
                shapes[name] = tuple(header.get_shape())
                spelled[name] = (path, written)
    tied = model.tie_embeddings
    names = require_shapes(
        shapes, model, table, place, lambda n: _is_mask(n) or (tied and n == "lm_head.weight")
    )
    for path in paths:
        with _opened(path, place) as file:
            for name, (where, written) in spelled.items():
                if where == path and not _is_mask(name):
                    theirs[name] = file.get_tensor(written)
    return from_format(theirs, names, table)


def _opened(path: Path, place: str) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{place}: {path.name} is damaged or cut off ({str(error)[:80]})",
            "fetch or copy it again",
        ) from error


def _prefixed(name: str, family: str) -> str:
    """Return a name with the prefix that files of a bare GPT-2 leave out."""
    if family == "gpt2" and not name.startswith(("transformer.", "lm_head.")):
        return f"transformer.{name}"
    return name


def _is_mask(name: str) -> bool:
    return name.endswith((".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq"))


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(atomic.read_bytes(path))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({str(error)[:60]})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content
