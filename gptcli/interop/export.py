"""Writing a trained network in the files of other programs, read back before they get their name.

Everything is written aside; what does not read back as the same network is not left behind.
"""

import contextlib
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, assert_never

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gptcli import atomic
from gptcli.checkpoint import TrainedModel, load_weights
from gptcli.config.model import ModelConfig
from gptcli.data.readers import shown
from gptcli.errors import CheckpointError, ConfigError, StorageError
from gptcli.interop.card import model_card
from gptcli.interop.gguf import FileDtype, read_gguf, require_gguf, write_gguf
from gptcli.interop.hf_config import Family, family_of, table_of, to_hugging_face
from gptcli.interop.hf_tokenizer import tokenizer_config, tokenizer_json, vocabulary_of
from gptcli.interop.hf_weights import CONFIG, WEIGHTS, open_folder
from gptcli.interop.names import to_format
from gptcli.interop.nanogpt import from_nanogpt, nanogpt_content, require_nanogpt
from gptcli.interop.weights import our_shapes, unpad_vocab
from gptcli.model import GPT
from gptcli.tokenizers import Tokenizer
from gptcli.tokenizers.simple import CharTokenizer

Format = Literal["hf", "gguf", "nanogpt"]
_PROBES = (
    "To be, or not  to be:\n\n\tthat's 12345 questions. ",
    " cafe\u0301 naïve Ⅷ 日本語 🙂 ",
    "<|endoftext|>",
)
_TOLERANCE = 1e-3  # of the largest logit; float32 reads back with a thousandth of that


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        family: The architecture it is there: gpt2, llama, qwen2 (GGUF only) or qwen3.
        parameters: What the files hold, as transformers counts them: without the vocabulary's
            padding, with the zeros of biases that only the family has.
        bytes: Of all files.
        logit_difference: The largest, between the checkpoint's network and what was read back.
        notes: What is not quite the same there.
    """

    path: str
    format: Format
    family: str
    parameters: int
    bytes: int
    logit_difference: float
    notes: tuple[str, ...]


def export(
    trained: TrainedModel, to: Format, out: Path, *, dtype: FileDtype = "float32",
    force: bool = False,
) -> Exported:  # fmt: skip
    """Write a network for another program.

    Args:
        trained: A checkpoint's network.
        to: A Hugging Face folder, a GGUF file, or nanoGPT's `ckpt.pt`.
        out: The folder or file.
        dtype: Of the matrices in a GGUF file.
        force: Set aside what is in the way, as `<name>~N`.

    Raises:
        ConfigError: The format cannot hold the network, or `out` is in the way.
        CheckpointError: It did not read back as the same network.
        StorageError: The disk is full or may not be written.
    """
    family, notes = _require_held(trained, to)
    _require_free(out, force, is_folder=to == "hf")
    characters = None
    if to == "nanogpt" and isinstance(trained.tokenizer, CharTokenizer):
        characters = out.absolute().with_name("meta.pkl")
        _require_free(characters, force, is_folder=False)
    model = trained.model.config.model_copy(update={"vocab_size": trained.tokenizer.vocab_size})
    weights = {name: p.detach().cpu() for name, p in trained.model.named_parameters()}
    weights = unpad_vocab(weights, trained.tokenizer.vocab_size)
    if to != "nanogpt":
        weights = _with_biases(weights, model, family)
    n_parameters = sum(weight.numel() for weight in weights.values())
    atomic.make_folder(out.parent)
    with _aside(out) as aside:
        match to:
            case "hf":
                card = model_card(trained, family, n_parameters, shown(out.name))
                _write_folder(aside, trained, weights, model, family, card)
                require_same_ids(aside, trained.tokenizer)
                read = _read_folder(aside)
            case "gguf":
                tokenizer = require_gguf(model, trained.tokenizer)
                with _write_errors(aside):
                    write_gguf(aside, weights, model, tokenizer, family, dtype, shown(out.stem))
                read = _network(*read_gguf(aside), aside)
            case "nanogpt":
                best_loss = trained.checkpoint.state.get("best_loss")
                content = nanogpt_content(weights, model, trained.step, best_loss)
                if characters is not None:  # sample.py looks for data/<dataset>/meta.pkl
                    content["config"] = {"dataset": f"../{characters.parent.name}"}
                with _write_errors(aside), aside.open("wb") as file:
                    torch.save(content, file)  # into an open file: no name troubles it
                read = _read_nanogpt(aside)
            case unreachable:
                assert_never(unreachable)
        difference = _require_same_logits(trained, read, out, dtype == "float32" and not notes)
        size = _write_characters(characters, trained.tokenizer) if characters else 0
        size += _place(aside, out)
    if to == "nanogpt":
        notes += _vocabulary_note(trained.tokenizer, characters)
    return Exported(str(out), to, family, n_parameters, size, difference, notes)


def _require_held(trained: TrainedModel, to: Format) -> tuple[Family, tuple[str, ...]]:
    """Return the family of a network and what will differ there; refuse what cannot be held."""
    model = trained.model.config
    family = family_of(model)
    if to == "nanogpt":
        require_nanogpt(model)
        exact = "nanoGPT computes the exact GELU, this network the one by tanh"
        return family, (exact,) if model.mlp == "gelu" else ()
    if to == "gguf":
        require_gguf(model, trained.tokenizer)
        if model.mlp == "gelu_erf":
            return family, ("llama.cpp computes GELU by tanh, this network the exact one",)
    elif family == "qwen2":
        # From 5.12 on transformers splits the text of every model_type qwen2 itself, whatever its
        # tokenizer files say. A Llama with biases in attention is the same model.
        return "llama", ()
    return family, ()


def _require_same_logits(trained: TrainedModel, read: GPT, out: Path, is_exact: bool) -> float:
    """Return the largest difference between a model's logits and those of what was read back."""
    difference, scale = logit_difference(trained.model, read, trained.tokenizer.vocab_size)
    # Written so that a NaN, which compares false, is refused too.
    if not difference <= (_TOLERANCE * scale if is_exact else scale):
        raise CheckpointError(
            f"{out}: what was written reads back with logits that differ by {difference:.2g}"
        )
    return difference


def _require_free(out: Path, force: bool, is_folder: bool) -> None:
    if out.name in ("", ".."):
        raise ConfigError(f"OUT: '{out}' is no name to write under", "name a new folder or file")
    with atomic.create_errors(out):
        is_there = out.exists()
    if not is_folder and out.is_dir():
        raise ConfigError(f"{out} is a folder; name the file to write in it")
    if not is_there or force or (is_folder and out.is_dir() and not any(out.iterdir())):
        return
    what = "is not empty" if out.is_dir() else "exists"
    raise ConfigError(
        f"{out} {what}", f"choose another path, or rename the old one to {out.name}~1 with --force"
    )


@contextlib.contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """Give a name beside `out` to write under; remove what is there if the block raises."""
    aside = atomic.aside_name(out)
    try:
        yield aside
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def _place(aside: Path, out: Path) -> int:
    """Flush what was written, give it its name, and return its bytes."""
    files = sorted(aside.iterdir()) if aside.is_dir() else [aside]
    for file in files:
        atomic.sync_file(file)
    size = sum(file.stat().st_size for file in files)
    with atomic.create_errors(out):
        if out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        elif out.exists():
            number = 1
            while (old := out.with_name(f"{out.name}~{number}")).exists():
                number += 1
            out.rename(old)
        os.replace(aside, out)
    atomic.sync_folder(out.parent)
    return size


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Turn what torch, safetensors and the system say of a failed write into our error."""
    with atomic.create_errors(path):
        try:
            yield
        except (SafetensorError, RuntimeError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # said better by its number
            raise StorageError(f"{path}: cannot be written ({str(error)[:100]})") from error


def _with_biases(
    weights: dict[str, Tensor], model: ModelConfig, family: Family
) -> dict[str, Tensor]:
    """Return weights with zeros for the biases that a family's files have and the model has not.

    All of them in a GPT-2; after attention in a Llama with biases on queries, keys and values.
    """
    if family != "gpt2" and not (family == "llama" and model.qkv_bias):
        return weights
    shapes = our_shapes(model.model_copy(update={"bias": True, "qkv_bias": None}))
    zeros = {
        name: torch.zeros(shape.shape)
        for name, shape in shapes.items()
        if name not in weights and (family == "gpt2" or name.endswith(".attn.c_proj.bias"))
    }
    return weights | zeros


def _write_folder(
    folder: Path, trained: TrainedModel, weights: dict[str, Tensor], model: ModelConfig,
    family: Family, card: str,
) -> None:  # fmt: skip
    """Write all files of a Hugging Face model."""
    tokenizer = trained.tokenizer
    theirs = to_format(weights, table_of(family), model)
    config = trained.checkpoint.config
    context = model.trained_context(config["data"].get("seq_len"))
    files = {
        CONFIG: to_hugging_face(model, family, tokenizer.vocab_size, tokenizer.eot),
        "generation_config.json": _generation(config["generate"], context, tokenizer.eot),
        "tokenizer.json": tokenizer_json(tokenizer),
        "tokenizer_config.json": tokenizer_config(context),
    }
    shutil.rmtree(folder, ignore_errors=True)
    with _write_errors(folder):
        folder.mkdir()
        for file, content in files.items():
            text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (folder / file).write_text(text, encoding="utf-8", newline="\n")
        (folder / "README.md").write_text(card, encoding="utf-8", newline="\n")
        whole_tensors = {
            name: tensor.clone(memory_format=torch.contiguous_format)
            for name, tensor in theirs.items()
        }
        save_file(whole_tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _write_characters(path: Path, tokenizer: Tokenizer) -> int:
    """Write the meta.pkl by which nanoGPT's sample.py reads and writes characters."""
    stoi = vocabulary_of(tokenizer)
    itos = {id: char for char, id in stoi.items()}
    with _aside(path) as aside, _write_errors(aside):
        aside.write_bytes(pickle.dumps({"vocab_size": len(stoi), "stoi": stoi, "itos": itos}))
        return _place(aside, path)


def _vocabulary_note(tokenizer: Tokenizer, characters: Path | None) -> tuple[str, ...]:
    """Return what to know of a vocabulary that nanoGPT does not take for granted."""
    if characters is not None:
        folder = characters.parent.name
        return (
            f"the characters are in {characters}; nanoGPT's sample.py --out_dir={folder} reads"
            f" them where {folder} is in nanoGPT's own folder",
        )
    if tokenizer.name == "gpt2":
        return ()
    return (
        f"nanoGPT has no place for the {tokenizer.name} vocabulary: its sample.py takes the ids"
        " for GPT-2's, and prints other text than `gpt generate`",
    )


def _generation(generate: dict[str, Any], context: int, eot: int) -> dict[str, Any]:
    """Return `generation_config.json`: the run's own way of sampling, as far as the context goes.

    transformers lets no context slide: beyond it learned positions are an IndexError there.
    """
    ids = {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot}
    content = ids | {"max_length": context}
    if not generate["temperature"]:
        return content | {"do_sample": False}
    content |= {"do_sample": True, "temperature": generate["temperature"]}
    content["top_k"] = generate["top_k"] or 0  # left out, transformers would take 50
    chosen = {key: generate[key] for key in ("top_p", "min_p") if generate[key] is not None}
    return content | chosen


def require_same_ids(folder: Path, tokenizer: Tokenizer) -> None:
    """Have transformers, where it is installed, read a few texts as the tokenizer does.

    Raises:
        CheckpointError: It reads one with other ids.
    """
    try:
        from transformers import AutoTokenizer, __version__
    except ImportError:
        return
    alphabet = tokenizer.definition()["alphabet"] if tokenizer.name == "char" else None
    hint = "install the version of transformers that constraints.txt names, and export again"
    try:
        theirs = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # of whatever kind: other versions raise others
        said = f"transformers {__version__} does not read the vocabulary ({str(error)[:100]})"
        raise CheckpointError(said, hint) from error
    for text in _PROBES:
        if alphabet is not None:
            text = "".join(char for char in text if char in alphabet)
        if theirs.encode(text, verbose=False) != tokenizer.encode(text).tolist():
            raise CheckpointError(
                f"transformers {__version__} reads {text!r} with other ids than the tokenizer"
                f" {tokenizer.name!r}",
                hint,
            )


def _read_folder(folder: Path) -> GPT:
    origin = open_folder(folder, str(folder))
    return _network(origin.model, origin.weights(), folder)


def _read_nanogpt(path: Path) -> GPT:
    content = torch.load(path, map_location="cpu", weights_only=True)
    origin = from_nanogpt(content, str(path), path)
    return _network(origin.model, origin.weights(), path)


def _network(model: ModelConfig, weights: dict[str, Tensor], path: Path) -> GPT:
    network = GPT(model)
    load_weights(network, weights, path)
    return network.eval()


@torch.no_grad()
def logit_difference(one: GPT, two: GPT, vocab_size: int) -> tuple[float, float]:
    """Return the largest difference of two networks' logits, and their largest size.

    Args:
        one: A network, perhaps with padded rows.
        two: Another one.
        vocab_size: How many logits to compare; the same random tokens go into both.
    """
    length = min(one.config.block_size, 64)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (2, length), generator=generator)
    first, second = one(tokens).logits, two(tokens).logits
    assert first is not None and second is not None
    first, second = first[..., :vocab_size], second[..., :vocab_size]
    return float((first - second).abs().max()), max(1.0, float(first.abs().max()))
