"""Whether prepared data is what a configuration says, and the command that prepares it so."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from gptcli.config.reference import keys
from gptcli.config.schema import Config, FilterConfig, TokenizerConfig
from gptcli.data.loader import Part
from gptcli.data.presets import PRESETS, data_dir, is_local
from gptcli.data.shards import Recipe
from gptcli.errors import DataError
from gptcli.tokenizers import make_tokenizer, with_chat_tokens

_TOKENIZER_KEYS = ("tokenizer.name", "tokenizer.vocab_size")


def require_same_settings(parts: Sequence[Part]) -> list[str]:
    """Refuse, with both values, data of other settings; return notes about other sources."""
    for part in parts:
        _require_same_data_settings(part.config, part.manifest.recipe)
        _require_same_tokenizer(part, parts[0])
    return [note for part in parts for note in _other_source(part)]


def _other_source(part: Part) -> list[str]:
    """Return a note if a folder was prepared from another file than the one that is named."""
    source, recipe = part.config.data.source, part.manifest.recipe
    is_file = isinstance(source, str) and is_local(part.config.data) and source not in PRESETS
    if not is_file or Path(str(source)).name == Path(recipe.source).name:
        return []
    return [
        f"{part.folder} was prepared from {recipe.source}, not from {source}; to train on that:"
        f" `{_prepare_command(part.config, recipe)}`"
    ]


def _require_same_tokenizer(part: Part, first: Part) -> None:
    """Refuse, with a DataError, a source that has another tokenizer than the first one."""
    if part.manifest.tokenizer.sha256 == first.manifest.tokenizer.sha256:
        return
    message = f"data.mix: {part.folder} and {first.folder} have different tokenizers"
    if part.manifest.is_chat and not first.manifest.is_chat:
        hint = "its chat tokens are those of conversations: name these first in data.mix, and run"
        raise DataError(message, f"{hint} `gpt prepare` with the configuration and --force")
    tokenizer = TokenizerConfig(path=first.folder.as_posix())
    config = part.config.model_copy(update={"tokenizer": tokenizer})
    command = _prepare_command(config, part.manifest.recipe)
    raise DataError(message, f"prepare it again: `{command}`")


def _require_same_data_settings(config: Config, recipe: Recipe) -> None:
    """Refuse, with both values, shards of other settings than the configuration has."""
    folder, again = data_dir(config.data), _prepare_command(config, recipe)
    recorded = _settings_of(recipe)
    if config.tokenizer.path is not None:
        recorded.pop("tokenizer.name")
        tokenizer = make_tokenizer(config.tokenizer, list)
        if recipe.conversation_format:
            tokenizer = with_chat_tokens(tokenizer)
        if tokenizer.fingerprint != recipe.tokenizer.sha256:
            raise DataError(
                f"{folder} was prepared with another tokenizer than"
                f" tokenizer.path = {config.tokenizer.path}",
                f"prepare it again: `{again}`",
            )
    for key, before in recorded.items():
        requested = _get(config, key)
        if config.is_set(key) and requested is not None and requested != before:
            raise DataError(
                f"{folder} was prepared with {key} = {before}, the configuration says {requested}",
                f"drop the setting, or prepare it again: `{again}`",
            )


def _settings_of(recipe: Recipe) -> dict[str, object]:
    """Return the settings that a folder was prepared with, by their keys."""
    chat = {"data.format": recipe.conversation_format, "data.bad_rows": recipe.bad_rows}
    return {
        **(chat if recipe.conversation_format else {}),
        "tokenizer.name": recipe.tokenizer.name,
        "tokenizer.vocab_size": recipe.max_vocab_size,
        "data.text_field": recipe.text_field,
        "data.encoding_errors": recipe.encoding_errors,
        "data.val_fraction": recipe.val_fraction,
        "data.dedup": recipe.dedup,
        "data.filters": recipe.filters,
    }


def _get(config: Config, key: str) -> object:
    """Return a setting as a recipe records it."""
    value = config.get(key)
    return value.model_dump(exclude_none=True) if isinstance(value, FilterConfig) else value


def _prepare_command(config: Config, recipe: Recipe) -> str:
    """Return the command that prepares the folder of `config` as it says, else as before."""
    recorded = _settings_of(recipe) | {"seed": recipe.seed}
    set_keys = filter(config.is_set, ("tokenizer.path", "data.config", *recorded))
    given = {key: _get(config, key) for key in set_keys}
    if given.keys() & {"tokenizer.path", "tokenizer.name"}:
        recorded = {key: value for key, value in recorded.items() if key not in _TOKENIZER_KEYS}
    source = config.data.source or recipe.source
    words = ["gpt", "prepare"]
    if isinstance(source, str):
        words.append(source)
    else:  # which has its own validation text
        words += ["-s", f"data.source={json.dumps(source.model_dump())}"]
        recorded.pop("data.val_fraction")
    words += ["--out", str(data_dir(config.data)), "--force"]
    for key, value in (recorded | given).items():
        if value != keys()[key].default:
            words += ["-s", f"{key}={value}"]
    return shlex.join(words)
