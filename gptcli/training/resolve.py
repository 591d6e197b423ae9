"""A run's settings, made whole: every `auto` and null that it keeps, checked against its data.

What was settled once is taken up again when a run is resumed.
"""

import shlex
from math import ceil
from pathlib import Path
from typing import Any

from gptcli.checkpoint import Checkpoint
from gptcli.config.reference import keys
from gptcli.config.schema import Config
from gptcli.data.loader import TokenLoader, require_window
from gptcli.data.presets import PRESETS
from gptcli.data.shards import Manifest, Recipe, TokenReader
from gptcli.data.sources import data_dir, is_local
from gptcli.device import available_devices, resolve_auto
from gptcli.errors import ConfigError, DataError
from gptcli.tokenizers import make_tokenizer
from gptcli.training.batch_size import compiling_pays

_TOKENIZER_KEYS = ("tokenizer.name", "tokenizer.vocab_size")
_MACHINE_KEYS = ("device", "dtype", "compile", "deterministic")


def resolve(
    config: Config,
    folder: Path,
    manifest: Manifest,
    checkpoint: Checkpoint | None,
    notes: list[str],
) -> Config:
    """Settle every `auto` and null that a run keeps, from its checkpoint if it has one."""
    if checkpoint is not None:
        update = {key: checkpoint.config[key] for key in _MACHINE_KEYS}
        update = {key: value for key, value in update.items() if getattr(config, key) == "auto"}
        if update.get("device", "cpu") not in available_devices():
            notes.append(f"this machine has no {update['device']}: the bits will differ")
            update = {}
        config = config.model_copy(update=update)
        if config.train.micro_batch_size == "auto":
            rows = checkpoint.config["train"]["micro_batch_size"]
            config = with_train(config, micro_batch_size=rows)
    config = resolve_auto(config)
    _require_same_data_settings(config, manifest)
    notes += _other_source(config, folder, manifest)
    vocab_size = config.model.vocab_size or manifest.tokenizer.vocab_size
    if vocab_size < manifest.tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size: {vocab_size} is smaller than the {manifest.tokenizer.vocab_size}"
            f" tokens of the vocabulary in {folder}"
        )
    sections = {
        "data": {"dir": str(folder), "seq_len": config.seq_len, "stride": config.stride},
        "tokenizer": {"name": manifest.tokenizer.name},
        "model": {"vocab_size": vocab_size},
        "train": {"tokens_per_step": config.tokens_per_step},
        "optim": {"min_lr": config.min_lr},
    }
    update = {key: getattr(config, key).model_copy(update=new) for key, new in sections.items()}
    return config.model_copy(update={**update, "run_dir": str(config.run_folder)})


def with_compile(config: Config, max_steps: int) -> Config:
    """Settle whether to compile; from then on a run keeps to it, for the bits differ."""
    if config.compile != "auto":
        return config
    return config.model_copy(update={"compile": compiling_pays(config, max_steps)})


def with_train(config: Config, **values: Any) -> Config:
    """Return `config` with other values in its train section."""
    return config.model_copy(update={"train": config.train.model_copy(update=values)})


def _other_source(config: Config, folder: Path, manifest: Manifest) -> list[str]:
    """Say so if the folder was made from another file than the configuration names."""
    here, there = config.data.source, manifest.recipe.source
    if not isinstance(here, str) or not is_local(config.data) or here in PRESETS:
        return []
    if Path(here).name == Path(there).name:
        return []
    return [f"{folder} was prepared from {there}, not from {here}; to train on that:"
            f" `{_prepare_again(config, manifest.recipe)}`"]  # fmt: skip


def _require_same_data_settings(config: Config, manifest: Manifest) -> None:
    """Refuse shards that were prepared otherwise than the configuration says.

    Raises:
        DataError: With both values.
    """
    found = _settings_of(manifest.recipe)
    again = f"prepare it again: `{_prepare_again(config, manifest.recipe)}`"
    if config.tokenizer.path is not None:
        found.pop("tokenizer.name")
        if make_tokenizer(config.tokenizer, list).fingerprint != manifest.tokenizer.sha256:
            raise DataError(
                f"{data_dir(config.data)} was prepared with another tokenizer than"
                f" tokenizer.path = {config.tokenizer.path}",
                again,
            )
    for key, there in found.items():
        here = config.get(key)
        if config.is_set(key) and here is not None and here != there:
            raise DataError(
                f"{data_dir(config.data)} was prepared with {key} = {there},"
                f" the configuration says {here}",
                f"drop the setting, or {again}",
            )


def _settings_of(recipe: Recipe) -> dict[str, object]:
    """Return the settings that a folder was prepared with, by their keys."""
    return {
        "tokenizer.name": recipe.tokenizer.name,
        "tokenizer.vocab_size": recipe.max_vocab_size,
        "data.text_field": recipe.text_field,
        "data.encoding_errors": recipe.encoding_errors,
        "data.val_fraction": recipe.val_fraction,
    }


def _prepare_again(config: Config, recipe: Recipe) -> str:
    """Return the command that prepares the folder of `config` as that says, else as it was."""
    there = _settings_of(recipe)
    here = {key: config.get(key) for key in ("tokenizer.path", *there) if config.is_set(key)}
    if here.keys() & {"tokenizer.path", "tokenizer.name"}:
        there = {key: value for key, value in there.items() if key not in _TOKENIZER_KEYS}
    source = config.data.source if isinstance(config.data.source, str) else recipe.source
    words = ["gpt", "prepare", source, "--out", str(data_dir(config.data)), "--force"]
    for key, value in (there | here).items():
        if value != keys()[key].default:
            words += ["-s", f"{key}={value}"]
    return shlex.join(words)


def open_tokens(
    folder: Path, manifest: Manifest, config: Config
) -> tuple[TokenReader, TokenReader | None]:
    """Open both splits; without validation tokens there is no second one."""
    train_tokens = TokenReader(folder, manifest, "train")
    val_tokens = TokenReader(folder, manifest, "val")
    if not len(val_tokens):
        return train_tokens, None
    require_window(val_tokens, config.seq_len, "val")
    return train_tokens, val_tokens


def close_tokens(train_tokens: TokenReader, val_tokens: TokenReader | None) -> None:
    """Close the files of both splits."""
    train_tokens.close()
    if val_tokens is not None:
        val_tokens.close()


def max_steps_of(config: Config, loader: TokenLoader) -> int:
    """Return the steps to train: given, or from epochs; one epoch if neither is."""
    limits = [config.train.max_steps] if config.train.max_steps else []
    if config.train.max_epochs or not limits:
        windows = (config.train.max_epochs or 1) * loader.n_windows
        limits.append(max(1, ceil(windows / (config.tokens_per_step // config.seq_len))))
    return min(limits)


def make_loader(config: Config, train_tokens: TokenReader) -> TokenLoader:
    """Return the training windows that `config` cuts from a split.

    Raises:
        DataError: The split is shorter than one window.
    """
    return TokenLoader(
        train_tokens,
        seq_len=config.seq_len,
        stride=config.stride,
        windows_per_step=config.tokens_per_step // config.seq_len,
        seed=config.seed,
    )
