"""Losses of models on text: what `gpt eval` calls, and `gptcli.evaluate` and `load` are."""

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from gptcli.checkpoint import TrainedModel
from gptcli.config import Config, load_config
from gptcli.config.schema import Split
from gptcli.data.packing import PackedRows, open_rows
from gptcli.data.presets import folder_at, is_address
from gptcli.data.readers import read_text
from gptcli.data.shards import Manifest, TokenReader, read_manifest
from gptcli.device import init_runtime
from gptcli.errors import CheckpointError, ConfigError, DataError, is_out_of_memory
from gptcli.evaluation import Evaluation, SpanOf, TokenArray, TokenSequence, TokenStats
from gptcli.evaluation import evaluate as score_tokens
from gptcli.evaluation.adapt import Learner
from gptcli.evaluation.metrics import spans_of_bytes
from gptcli.formatting import plural
from gptcli.interop.pretrained import open_model, with_tokenizer
from gptcli.tokenizers import UnknownCharacters, with_chat_tokens

Checkpoint = str | os.PathLike[str] | TrainedModel | None
Place = str | os.PathLike[str] | None

_log = logging.getLogger("gptcli")


def load(
    checkpoint: Checkpoint = None, *, device: str = "auto", data: Place = None
) -> TrainedModel:
    """Return a model, its tokenizer and what its checkpoint says.

    Args:
        checkpoint: A file, a run folder or a run's name, or what `model.init_from` takes: gpt2,
            hf:org/name, a Hugging Face folder, a nanoGPT ckpt.pt. None is the newest run's best.
        device: auto, cpu, cuda or mps.
        data: Prepared data whose tokenizer the weights of another program have.

    Raises:
        CheckpointError: There is none, or it is damaged.
        ConfigError: Nothing says which tokens it has, or they are not those of `data`.
    """
    return open_checkpoint(checkpoint, load_config(None, flags={"device": device}), data)


def open_checkpoint(checkpoint: Checkpoint, config: Config, data: Place = None) -> TrainedModel:
    """Return the model that `load` would; what it returned stays as it is."""
    if isinstance(checkpoint, TrainedModel):
        return checkpoint
    name = None if checkpoint is None else os.fspath(checkpoint)
    return open_model(
        name, config, init_runtime(config).device, folder_at(str(data)) if data else None
    )


def _folder(trained: TrainedModel, source: str | None) -> Path:
    """Return the folder of the data that a model was trained on."""
    data = trained.checkpoint.data
    named = data.get("parts", {}).get(source, data).get("dir")
    return folder_at(str(named)) if is_address(named) else trained.data_of(source)


def device_of(trained: TrainedModel) -> str:
    """Return the kind of device that a model is on."""
    return trained.model.wte.weight.device.type


@dataclass(frozen=True)
class Score:
    """The figures of a model on a text: a file (split is `text`), or train or val of a folder.

    `adapted` are those of a copy that learned from each window once it was scored. Of
    conversations, what is trained on is scored.
    """

    trained: TrainedModel
    place: Path
    split: str
    evaluation: Evaluation
    seconds: float
    adapted: Evaluation | None = None
    conversations: int | None = None  # None: text


def evaluate(
    checkpoint: Checkpoint = None,
    *,
    text: Place = None,
    data: Place = None,
    source: str | None = None,
    split: Split = "val",
    stride: int | None = None,
    max_tokens: int | None = None,
    device: str = "auto",
    dtype: str = "float32",
) -> Evaluation:
    """Score a model on text: loss, perplexity, bits per byte, and their uncertainty.

    Args:
        checkpoint: As for `load`, or what it returned.
        text: A file to score.
        data: Prepared data to score; None is what the model was trained on.
        source: Of a model that was trained on a mixture, the source to score.
        split: Of the data: train or val.
        stride: Tokens that each window adds; None is the model's context.
        max_tokens: Score about this many, evenly spaced; None is all.
        device: auto, cpu, cuda or mps.
        dtype: auto, float32, bfloat16 or float16.

    Raises:
        GptError: The checkpoint or the text cannot be used, or the arguments contradict each other.
    """
    config = load_config(None, flags={"device": device, "dtype": dtype})
    [score] = compare(
        [checkpoint], config, text=text, data=data, source=source, split=split, stride=stride,
        max_tokens=max_tokens,
    )  # fmt: skip
    return score.evaluation


def compare(
    checkpoints: Sequence[Checkpoint],
    config: Config,
    *,
    text: Place = None,
    data: Place = None,
    source: str | None = None,
    split: Split = "val",
    stride: int | None = None,
    max_tokens: int | None = None,
    adapt_lr: float | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Score]:
    """Score several models on one text; `evaluate` says what the options are.

    Args:
        checkpoints: The models; without `text` and `data`, the data of the first are scored.
        config: Device, precision, compilation, context (`data.seq_len`) and encoding errors.
        adapt_lr: Also score copies that learn while they read, at this rate; 0 changes nothing.
        on_progress: Called with (windows done, windows in all) of a model.

    Raises:
        GptError: As `evaluate`; also if the models would score different parts of the text.
    """
    if sum(given is not None for given in (text, data, source)) > 1:
        raise ConfigError("data, text and source cannot be combined: there is one text to score")
    if split not in get_args(Split):
        raise ConfigError(f"split: expected train or val, got {split!r}")
    models = [open_checkpoint(checkpoint, config, data) for checkpoint in checkpoints]
    contexts = [_context(config.data.seq_len, model) for model in models]
    _require_same_text(contexts, stride, max_tokens, is_file=text is not None)
    given, name = (data, split) if text is None else (text, "text")
    path = _folder(models[0], source) if given is None else folder_at(str(given))
    if text is None and (manifest := read_manifest(path)).is_chat:
        _require_rows(path, contexts, stride, adapt_lr)
        models = [_with_chat_tokens(model, manifest) for model in models]
    is_mixed = len({model.tokenizer.fingerprint for model in models}) > 1
    texts: list[tuple[TokenSequence | PackedRows, SpanOf | None]] = []
    for model, context in zip(models, contexts, strict=True):  # refusals come before any score
        if text is None:
            texts.append((_split_tokens(path, split, model, context), None))
            continue
        of_file, parts = _text_tokens(path, model, config.data.encoding_errors)
        texts.append((of_file, parts if is_mixed else None))
    scores = []
    for model, context, (tokens, span_of) in zip(models, contexts, texts, strict=True):
        began = time.perf_counter()
        how: dict[str, Any] = {
            "context": context, "stride": stride, "max_tokens": max_tokens,
            "units": TokenStats(model.tokenizer), "span_of": span_of, "on_progress": on_progress,
            "rows": None if adapt_lr is None else 1,  # a copy learns after each
        }  # fmt: skip
        with tokens:
            found, adapted = _score(model, config, tokens, **how), None
            seconds = time.perf_counter() - began
            if adapt_lr is not None:
                adapted = _score(model, config, tokens, adapt_lr, **how)
        n = int((tokens.lengths > 0).sum()) if isinstance(tokens, PackedRows) else None
        scores.append(Score(model, path, name, found, seconds, adapted, n))
    return scores


def _text_tokens(path: Path, trained: TrainedModel, errors: str) -> tuple[TokenSequence, SpanOf]:
    """Return the tokens of a text file, with nothing before it, and the span that each is in."""
    tokenizer = trained.tokenizer
    pieces, is_changed = [], False
    try:
        for text in read_text(path, errors, tokenizer.safe_cut):
            pieces.append(tokenizer.encode(text))
            if tokenizer.is_foreign and not is_changed:
                is_changed = tokenizer.decode(pieces[-1].tolist()) != text
    except UnknownCharacters as error:
        hint = "its tokenizer knows the characters of its training text only"
        raise DataError(f"{path}: {error.message}", hint) from error
    tokens = np.concatenate(pieces)
    if len(tokens) < 2:
        raise DataError(f"{path}: {plural(len(tokens), 'token')}; scoring takes at least 2")
    if is_changed:
        _log.warning(
            f"the tokenizer of {trained.path} changes this text; its figures, bits per byte"
            " too, are those of the changed text"
        )
    return TokenArray(tokens), spans_of_bytes(tokenizer.token_lengths()[tokens]).__getitem__


def _split_tokens(
    folder: Path, split: Split, trained: TrainedModel, context: int
) -> TokenReader | PackedRows:
    """Open a split that the model's tokenizer wrote; conversations in rows of `context` tokens."""
    manifest = read_manifest(folder)
    if manifest.tokenizer.sha256 != trained.tokenizer.fingerprint:
        raise DataError(
            f"{folder} was written by another tokenizer ({manifest.tokenizer.name},"
            f" {manifest.tokenizer.vocab_size:,} ids) than the checkpoint's"
            f" ({trained.tokenizer.name}, {trained.tokenizer.vocab_size:,} ids)",
            "name the data it was trained on with --data, or score a file with --text",
        )
    if not manifest.is_chat:
        tokens = TokenReader(folder, manifest, split)
    elif (rows := open_rows(folder, manifest, split, context, seed=0)) is not None:
        return rows
    if manifest.is_chat or len(tokens) < 2:
        raise DataError(f"{folder}: no {split} tokens", "try --split train, or --text FILE")
    return tokens


def _require_rows(
    path: Path, contexts: list[int], stride: int | None, adapt_lr: float | None
) -> None:
    """Refuse what only text has, and rows that differ from model to model."""
    if stride is not None or adapt_lr is not None:
        what = "stride" if stride is not None else "adapt"
        raise ConfigError(f"{what}: {path} holds conversations, which are scored in whole rows")
    if min(contexts) < max(contexts):
        raise ConfigError(
            f"contexts of {min(contexts)} and {max(contexts)} tokens cut long conversations at"
            " different places",
            f"use one context for all with -s data.seq_len={min(contexts)}",
        )


def _with_chat_tokens(trained: TrainedModel, manifest: Manifest) -> TrainedModel:
    """Return a base model that reads conversations of its tokenizer; others stay as they are.

    Its rows for chat tokens are drawn, as for a run that starts from it.
    """
    tokenizer = with_chat_tokens(trained.tokenizer)
    if trained.tokenizer.chat or tokenizer.fingerprint != manifest.tokenizer.sha256:
        return trained
    return with_tokenizer(trained, tokenizer)


def _score(
    trained: TrainedModel,
    config: Config,
    tokens: TokenSequence | PackedRows,
    adapt_lr: float | None = None,
    **how: Any,
) -> Evaluation:
    runtime = init_runtime(config.model_copy(update={"device": device_of(trained)}))
    model = trained.model
    if adapt_lr is not None:
        learner = Learner(model, runtime, adapt_lr)
        model, how["learn"] = learner.model, learner.learn
    model = model.compiled() if runtime.compile else model
    try:
        found = score_tokens(model, tokens, runtime, **how)
    except RuntimeError as error:
        if not runtime.compile or is_out_of_memory(error):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        hint = "turn it off: -s compile=false"
        raise ConfigError(f"compile: not possible here ({reason})", hint) from error
    assert found is not None
    if not math.isfinite(found.nats) and adapt_lr:
        hint = "use a lower rate with --adapt-lr"
        raise ConfigError(f"{trained.path}: it diverges when it learns at rate {adapt_lr:g}", hint)
    if not math.isfinite(found.nats):
        hint = "if its weights are sound, try -s dtype=float32"
        raise CheckpointError(f"{trained.path}: the model's output is not finite", hint)
    return found


def _context(seq_len: int | None, trained: TrainedModel) -> int:
    block_size = trained.model.config.block_size
    if seq_len is not None and seq_len > block_size:
        raise ConfigError(
            f"data.seq_len: {seq_len} is longer than the context of {block_size}"
            + (f" that {trained.path} was trained on" if trained.is_cut else "")
        )
    return seq_len or block_size


def _require_same_text(
    contexts: list[int], stride: int | None, max_tokens: int | None, *, is_file: bool
) -> None:
    """Refuse windows that skip tokens, or that differ from model to model."""
    for name, value in (("stride", stride), ("max_tokens", max_tokens)):
        if value is not None and value < 1:
            raise ConfigError(f"{name}: expected at least 1, got {value}")
    shortest, longest = min(contexts), max(contexts)
    if stride is not None and stride > shortest:
        raise ConfigError(f"stride: {stride} would skip tokens; the context is {shortest}")
    if max_tokens is None or len(contexts) == 1:
        return
    if is_file:
        hint = "shorten the file itself"
        raise ConfigError("max_tokens: several models are compared on a whole text", hint)
    if shortest < longest:
        raise ConfigError(
            f"max_tokens: contexts of {shortest} and {longest} tokens would choose different parts"
            " of the text",
            f"use one context for all with -s data.seq_len={shortest}, or leave max_tokens out",
        )
