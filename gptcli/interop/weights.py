"""Weights on their way in and out, whatever the program: first the shape, then the tensors.

Nothing is allocated before a file's own list of names and shapes is what the shape demands.
"""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptcli.checkpoint import TrainedModel
from gptcli.config.model import ModelConfig
from gptcli.errors import CheckpointError, ConfigError
from gptcli.formatting import plural
from gptcli.interop import FileDtype
from gptcli.interop.hf_config import Family
from gptcli.interop.hf_tokenizer import CHAT_WORDS, Vocabulary, specials_of, vocabulary_of
from gptcli.interop.names import Table, to_format
from gptcli.model import GPT
from gptcli.seeding import derive_seed
from gptcli.tokenizers import Tokenizer, bpe

_EMBEDDINGS = ("wte.", "lm_head.", "value_embeds.")  # what has a row for each token


@dataclass(frozen=True)
class Pretrained:
    """A model of another program, or of an earlier run."""

    name: str  # what `model.init_from` calls it
    place: str  # where its files are, for errors
    revision: str | None  # commit on the Hub, or the step of one of our runs; None for other files
    model: ModelConfig  # its shape
    vocabulary: Vocabulary | None  # its tokens and their ids; None where its files do not say
    tokenizer: Callable[[], Tokenizer] | None  # makes its tokenizer; None where it is not known
    weights: Callable[[], dict[str, Tensor]]  # reads the tensors, by our names
    data: str | None = None  # folder of the data it was trained on, which holds its tokenizer

    def facts(self) -> dict[str, Any]:
        """Return what a run records about where it started."""
        return {"init_from": self.name, "revision": self.revision}

    def shape_for(self, tokenizer: Tokenizer) -> ModelConfig:
        """Return its shape, with rows for special tokens where only those are missing."""
        n_rows, n_tokens = self.model.vocab_size or 0, tokenizer.vocab_size
        if set(range(n_rows, n_tokens)) <= set(specials_of(tokenizer).values()):
            return self.model.model_copy(update={"vocab_size": max(n_rows, n_tokens)})
        return self.model

    @property
    def n_known(self) -> int:
        """The rows of its vocabulary, without those that only pad it."""
        n_rows = self.model.vocab_size or 0
        return min(n_rows, max((self.vocabulary or {}).values(), default=n_rows) + 1)

    def require_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Refuse a tokenizer whose ids mean other tokens than those it was trained on.

        Chat tokens may be new.

        Raises:
            ConfigError: With the number of ids that mean something else.
        """
        if self.vocabulary is None:
            return
        ours, known = vocabulary_of(tokenizer), self.vocabulary
        new = {word for word in CHAT_WORDS
               if word not in known and ours.get(word) not in known.values()}  # fmt: skip
        differing = [word for word, id in ours.items() if known.get(word) != id and word not in new]
        if not differing:
            return
        hint = "prepare the data with the tokenizer of these weights"
        if vocabulary_of(bpe.gpt2()).items() <= self.vocabulary.items():
            hint = "prepare the data with -s tokenizer.name=gpt2"
        elif self.data is not None:
            hint = f"prepare the data with -s tokenizer.path={shlex.quote(self.data)}"
        elif self.tokenizer is not None:
            command = f"`gpt eval {shlex.quote(self.name)} --text FILE`"
            hint = f"{command} scores text with the model's own tokenizer"
        raise ConfigError(
            f"{self.name} was trained on other tokens than those of the '{tokenizer.name}'"
            f" tokenizer: {len(differing):,} of {len(ours):,} ids mean something else",
            hint,
        )


@dataclass(frozen=True)
class Form:
    """What a model is in an export format."""

    family: Family
    notes: tuple[str, ...] = ()  # what is not the same there, for people
    is_exact: bool = True  # the same logits
    is_folder: bool = False
    beside: Path | None = None  # a second file


@dataclass(frozen=True)
class Source:
    """A model to export, its shape and its weights by our names without padded rows."""

    trained: TrainedModel
    form: Form
    model: ModelConfig
    weights: dict[str, Tensor]
    out: Path
    dtype: FileDtype

    def with_biases(self) -> dict[str, Tensor]:
        """Return the weights, with zeros for biases that only the family's files have.

        All of them in a GPT-2; after attention in a Llama with biases on queries, keys and values.
        """
        is_gpt2 = self.form.family == "gpt2"
        if not is_gpt2 and not (self.form.family == "llama" and self.model.qkv_bias):
            return self.weights
        shapes = our_shapes(self.model.model_copy(update={"bias": True, "qkv_bias": None}))
        zeros = {
            name: torch.zeros(shape)
            for name, shape in shapes.items()
            if name not in self.weights and (is_gpt2 or name.endswith(".attn.c_proj.bias"))
        }
        return self.weights | zeros


def our_shapes(model: ModelConfig) -> dict[str, torch.Size]:
    """Return the shapes of a model's parameters."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in GPT(model).named_parameters()}


def their_shapes(model: ModelConfig, table: Table) -> dict[str, torch.Size]:
    """Return the shapes of a model's tensors in a format; a KeyError if it has no place for one."""
    ours = {name: torch.empty(shape, device="meta") for name, shape in our_shapes(model).items()}
    return {name: tensor.shape for name, tensor in to_format(ours, table, model).items()}


def require_shapes(
    actual: Mapping[str, tuple[int, ...]],
    model: ModelConfig,
    table: Table,
    place: str,
    ignored: Callable[[str], bool] = lambda name: False,
) -> list[str]:
    """Compare the tensors of a file with those a model needs; return our parameters' names.

    Names that are `ignored` are no weights: masks, a tied head that is repeated.

    Raises:
        CheckpointError: A tensor is missing, of another shape, or not known.
    """
    try:
        expected = their_shapes(model, table)
    except KeyError as error:
        raise CheckpointError(f"{place}: the format has no place for {error}") from error
    for name, shape in expected.items():
        if name not in actual:
            raise CheckpointError(f"{place}: tensor {name} is missing")
        if tuple(actual[name]) != shape:
            raise CheckpointError(
                f"{place}: tensor {name} is {list(actual[name])}, the model needs {list(shape)}"
            )
    unknown = sorted(name for name in actual if name not in expected and not ignored(name))
    if unknown:
        count = plural(len(unknown), "unknown tensor")
        raise CheckpointError(f"{place}: {count} ({', '.join(unknown[:3])})")
    return list(our_shapes(model))


def resize_vocab(
    weights: Mapping[str, Tensor], model: ModelConfig, n_known: int | None = None
) -> dict[str, Tensor]:
    """Fit weights to `model`: cut learned positions to its context, pad the vocabulary to its rows.

    Rows from `n_known` on are padding. A padded row is the mean of the others: its logit is then
    the mean logit, so that k padded rows add at most the share k / V to the partition function
    (Jensen). A row of zeros has the logit 0, far above those of GPT-2, and would take nearly all
    the probability.
    """
    fitted, n_rows = dict(weights), model.vocab_size or 0
    if "wpe.weight" in fitted:
        fitted["wpe.weight"] = fitted["wpe.weight"][: model.block_size]
    for name, table in weights.items():
        if name.startswith(_EMBEDDINGS) and len(table[:n_known]) < n_rows:
            table = table[:n_known]
            mean = table.float().mean(dim=0, keepdim=True).to(table.dtype)
            fitted[name] = torch.cat((table, mean.expand(n_rows - len(table), -1)))
    return fitted


def add_tokens(
    weights: Mapping[str, Tensor], model: ModelConfig, tokens: range, seed: int
) -> dict[str, Tensor]:
    """Fit weights to `model` as `resize_vocab` does, with new tokens after the known ones.

    Their rows are drawn as those of the others are spread: with the same row two tokens would be
    one, and stay so where embeddings are frozen.
    """
    fitted = resize_vocab(weights, model, tokens.start)
    for name, table in fitted.items():
        if name.startswith(_EMBEDDINGS) and len(tokens) > 1:
            known = table[: tokens.start].float().cpu()
            generator = torch.Generator().manual_seed(derive_seed("new tokens", seed, name))
            drawn = torch.empty(len(tokens), known.shape[1]).normal_(generator=generator)
            rows = (known.mean(dim=0) + known.std(dim=0) * drawn).to(table)
            fitted[name] = torch.cat((table[: tokens.start], rows, table[tokens.stop :]))
    return fitted


def unpad_vocab(weights: Mapping[str, Tensor], n_rows: int) -> dict[str, Tensor]:
    """Return weights without the vocabulary's padding: the first `n_rows` rows."""
    return {
        name: w[:n_rows].clone() if name.startswith(_EMBEDDINGS) else w
        for name, w in weights.items()
    }
