"""Reading Hugging Face folders and Hub repositories: config.json and safetensors, never pickles."""

import contextlib
import json
from collections.abc import Callable
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
from gptcli.interop.names import from_format
from gptcli.interop.weights import Pretrained, require_shapes, their_shapes
from gptcli.tokenizers import Tokenizer, bpe
from gptcli.tokenizers.foreign import ForeignTokenizer

# The commits these names have had since the weights became safetensors.
GPT2_REVISIONS = {
    "gpt2": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "gpt2-large": "32b71b12589c2f8d625668d2335a01cac3249519",
    "gpt2-xl": "15ea56dee5df4983c59b2538573817e1667135e2",
}
WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
TOKENIZER = "tokenizer.json"
_MASKS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # which are no weights
_FLOATS = {"F64", "F32", "F16", "BF16"}
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model.pt")

_Find = Callable[..., Path | None]  # a file of the model by name, fetched unless fetch=False
_Known = tuple[Vocabulary | None, Callable[[], Tokenizer] | None]  # as far as the files say


def open_folder(folder: Path, name: str) -> Pretrained:
    """Open a folder that a Hugging Face model was saved in.

    Raises:
        CheckpointError: It holds no such model, or one that is not supported.
    """

    def find(file: str, fetch: bool = True) -> Path | None:
        return folder / file if (folder / file).is_file() else None

    return _open(find, name, str(folder))


def open_hub(name: str) -> Pretrained:
    """Open `gpt2`, `gpt2-medium`, ..., or `hf:org/name[@revision]`, pinned to a commit.

    Raises:
        CheckpointError: There is no such model, it cannot be reached, or it is not supported.
    """
    if name in GPT2_REVISIONS:
        repository, revision = f"openai-community/{name}", GPT2_REVISIONS[name]
    else:
        repository, _, revision = name.removeprefix("hf:").partition("@")
    if repository.count("/") != 1:
        raise CheckpointError(f"{name}: expected hf:org/name[@revision]")
    revision = revision or "main"

    def find(file: str, fetch: bool = True) -> Path | None:
        try:
            hub_file = HubFile(repository, file, revision, repo_type="model")
            if not fetch:
                return Path(file) if hub_file.exists() else None
            return hub_file.fetch()
        except MissingFileError:
            return None
        except DataError as error:
            raise CheckpointError(error.message, error.hint) from error

    config = find(CONFIG)
    if config is not None:
        revision = config.parent.name  # the cache keeps files in a folder named by their commit
    return _open(find, name, f"hf:{repository}", revision)


def _open(find: _Find, name: str, place: str, revision: str | None = None) -> Pretrained:
    path = find(CONFIG)
    if path is None:
        raise CheckpointError(f"{place}: no {CONFIG}, so not a Hugging Face model")
    content = _json(path)
    model, family = from_hugging_face(content, f"{place}/{CONFIG}")
    parts = {"attention_bias": ".self_attn.", "mlp_bias": ".mlp."} if family == "llama" else {}
    unbiased = tuple(part for key, part in parts.items() if not content.get(key))

    def weights() -> dict[str, Tensor]:
        return _read(_weight_files(find, place), model, family, unbiased, place)

    known = _vocabulary(find, name, model.vocab_size, place)
    return Pretrained(name, place, revision, model, *known, weights)


def _vocabulary(find: _Find, name: str, n_rows: int | None, place: str) -> _Known:
    """Return the tokens with their ids, and what makes the tokenizer."""
    if name in GPT2_REVISIONS:  # some come without
        return assumed_vocabulary(len(bpe.gpt2().ranks) + 1)
    for file in (TOKENIZER, "vocab.json"):
        path = find(file)
        if path is None:
            continue
        content, vocabulary = _json(path), {}
        # There are kinds of vocabulary without single ids, such as Unigram.
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
            words = content if file == "vocab.json" else dict(content["model"]["vocab"])
            added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
            vocabulary = words | added
        if vocabulary == vocabulary_of(bpe.gpt2()):
            return vocabulary, bpe.gpt2
        return vocabulary, partial(_tokenizer, find, path, place) if file == TOKENIZER else None
    return assumed_vocabulary(n_rows)


def _tokenizer(find: _Find, path: Path, place: str) -> Tokenizer:
    """Make the tokenizer of a `tokenizer.json`, with the ids that end a text."""
    eos = None
    for file in ("generation_config.json", CONFIG):
        settings = find(file)
        if eos is None and settings is not None:
            eos = _json(settings).get("eos_token_id")
    ends = [id for id in (eos if isinstance(eos, list) else [eos]) if isinstance(id, int)]
    try:
        return ForeignTokenizer(atomic.read_bytes(path).decode(), ends)
    except (DataError, OSError, ValueError) as error:
        raise CheckpointError(f"{place}/{TOKENIZER}: {error}") from error


def assumed_vocabulary(n_rows: int | None) -> _Known:
    """Return GPT-2's vocabulary for an embedding of its size, padded or not; else none."""
    if not 50257 <= (n_rows or 0) <= 50304:
        return None, None
    return vocabulary_of(bpe.gpt2()), bpe.gpt2


def _weight_files(find: _Find, place: str) -> list[Path]:
    """Return the files of the weights: one, or those that an index lists."""
    single = find(WEIGHTS)
    if single is not None:
        return [single]
    index = find(INDEX)
    if index is None:
        pickled = next((name for name in _PICKLES if find(name, fetch=False)), None)
        raise CheckpointError(
            f"{place}: no {WEIGHTS}" + (f", only {pickled}, which may run code" if pickled else ""),
            "convert it to safetensors, or use a revision that has them" if pickled else None,
        )
    try:
        names = sorted(set(_json(index)["weight_map"].values()))
        if not all(Path(name).name == name for name in names):
            raise ValueError("a path")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{place}/{INDEX}: damaged, it lists no files") from error
    paths = []
    for name in names:
        path = find(name)
        if path is None:
            raise CheckpointError(f"{place}: {name} is missing")
        paths.append(path)
    return paths


def _read(
    paths: list[Path], model: ModelConfig, family: Family, unbiased: tuple[str, ...], place: str
) -> dict[str, Tensor]:
    """Read weights, once the headers of all files list what the model needs."""
    table = table_of(family)
    theirs = {  # parts of a Llama that have no biases get zeros
        name: torch.zeros(shape)
        for name, shape in their_shapes(model, table).items()
        if name.endswith(".bias") and any(part in name for part in unbiased)
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(_opened(path, place)) for path in paths]
        written: dict[str, tuple[Any, str]] = {}  # full name -> its file, and the name there
        for file in files:
            for short in file.keys():
                header, name = file.get_slice(short), _full_name(short, family)
                if name.endswith(_MASKS):
                    continue
                if header.get_dtype() not in _FLOATS:
                    raise CheckpointError(
                        f"{place}: tensor {short} is {header.get_dtype()}, not floating point",
                        "quantized weights cannot be trained; use the original ones",
                    )
                if name in theirs:
                    raise CheckpointError(f"{place}: tensor {short} contradicts {CONFIG}")
                shapes[name], written[name] = tuple(header.get_shape()), (file, short)
        repeated = {"lm_head.weight"} if model.tie_embeddings else set()
        names = require_shapes(shapes, model, table, place, repeated.__contains__)
        for name in written.keys() - repeated:
            file, short = written[name]
            theirs[name] = file.get_tensor(short)
    return from_format(theirs, names, table)


def _opened(path: Path, place: str) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{place}: {path.name} is damaged or cut off ({str(error)[:80]})",
            "fetch or copy it again",
        ) from error


def _full_name(name: str, family: str) -> str:
    """Return a name with the prefix that files of a bare GPT-2 leave out."""
    if family == "gpt2" and not name.startswith(("transformer.", "lm_head.")):
        return f"transformer.{name}"
    return name


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(atomic.read_bytes(path))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({str(error)[:60]})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content
