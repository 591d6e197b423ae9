"""Export of a trained model to the files of other programs.

Everything is written aside and read back; what reads back as another model gets no name.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError
from torch import Tensor

from gptcli import atomic
from gptcli.checkpoint import TrainedModel, load_weights
from gptcli.config.model import ModelConfig
from gptcli.errors import CheckpointError, StorageError
from gptcli.interop import FileDtype, Format, gguf, hf, nanogpt
from gptcli.interop.weights import Form, Source, unpad_vocab
from gptcli.model import GPT


class Target(Protocol):
    """A module for one format."""

    def check(self, trained: TrainedModel, out: Path) -> Form:
        """Return the model's form in this format, or raise a ConfigError that says why not."""

    def write(self, path: Path, source: Source) -> int:
        """Write to `path`, `form.beside` next to it; return the number of parameters."""

    def read_back(self, path: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
        """Return the model that the program would compute, and its weights by our names."""


TARGETS: dict[Format, Target] = {
    Format.HF: hf,
    Format.GGUF: gguf,
    Format.NANOGPT: nanogpt,
}
_TOLERANCE = 1e-3  # of the largest logit; float32 reads back with a thousandth of that


@dataclass(frozen=True)
class Exported:
    """What was written."""

    path: str
    format: Format
    family: str  # the architecture there: gpt2, llama, qwen2 (GGUF only) or qwen3
    # as transformers counts them: without padding of the vocabulary, with the zeros of biases that
    # only the family has
    parameters: int
    bytes: int
    logit_difference: float  # the largest, between the checkpoint's model and what was read back
    notes: tuple[str, ...]  # what is not quite the same there


def export(
    trained: TrainedModel,
    to: Format,
    out: Path,
    *,
    dtype: FileDtype = FileDtype.FLOAT32,
    force: bool = False,
) -> Exported:
    """Write a model for another program; with `force`, rename an existing `out` to `<name>~N`.

    Raises:
        ConfigError: The format cannot hold the model, or `out` exists.
        CheckpointError: It did not read back as the same model.
        StorageError: The disk is full or may not be written.
    """
    target = TARGETS[to]
    form = target.check(trained, out)
    for path in (out, form.beside):
        if path is not None:
            atomic.require_free(path, force, is_folder=form.is_folder)
    n_tokens = trained.tokenizer.vocab_size
    model = trained.model.config.model_copy(update={"vocab_size": n_tokens})
    weights = {name: p.detach().cpu() for name, p in trained.model.named_parameters()}
    source = Source(trained, form, model, unpad_vocab(weights, n_tokens), out, dtype)
    atomic.make_folder(out.parent)
    with _aside(out) as folder:
        # A plain name whatever `out` is called, for not every library takes each; errors know it.
        aside = folder / folder.name
        with _write_errors(out):
            n_parameters = target.write(aside, source)
        shape, weights = target.read_back(aside)
        reread = GPT(shape).eval()
        load_weights(reread, weights, aside)
        difference, scale = logit_difference(trained.model, reread, n_tokens)
        is_exact = form.is_exact and dtype == FileDtype.FLOAT32
        # Written so that a NaN, which compares false, is refused too.
        if not difference <= (_TOLERANCE * scale if is_exact else scale):
            raise CheckpointError(
                f"{out}: what was written reads back with logits that differ by {difference:.2g}"
            )
        size = _place(folder / form.beside.name, form.beside) if form.beside is not None else 0
        size += _place(aside, out)
    return Exported(str(out), to, form.family, n_parameters, size, difference, form.notes)


@contextlib.contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """Make a folder beside `out` that is gone after the block."""
    folder = atomic.aside_name(out)
    shutil.rmtree(folder, ignore_errors=True)  # of a killed process of the same number
    with atomic.create_errors(out):
        folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _place(aside: Path, out: Path) -> int:
    """Flush what was written aside, give it its name, and return its bytes."""
    files = sorted(aside.iterdir()) if aside.is_dir() else [aside]
    for file in files:
        atomic.sync_file(file)
    size = sum(file.stat().st_size for file in files)
    with atomic.create_errors(out):
        if out.is_dir() and not any(out.iterdir()):
            out.rmdir()
        elif out.exists():
            atomic.set_aside(out)
        os.replace(aside, out)
    atomic.sync_folder(out.parent)
    return size


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """Turn what torch, safetensors and the system raise for a failed write into our error."""
    with atomic.create_errors(path):
        try:
            yield
        except (SafetensorError, RuntimeError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # its number says more
            raise StorageError(f"{path}: cannot be written ({str(error)[:100]})") from error


@torch.no_grad()
def logit_difference(one: GPT, two: GPT, vocab_size: int) -> tuple[float, float]:
    """Return the largest difference of two models' logits for the same tokens, and the largest.

    The first `vocab_size` logits are compared: padding may follow.
    """
    length = min(one.config.block_size, 64)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (2, length), generator=generator)
    first, second = one(tokens).logits, two(tokens).logits
    assert first is not None and second is not None
    first, second = first[..., :vocab_size], second[..., :vocab_size]
    return float((first - second).abs().max()), max(1.0, float(first.abs().max()))
