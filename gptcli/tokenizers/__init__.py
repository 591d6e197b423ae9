"""Text to token ids and back; each tokenizer is small enough to travel in a checkpoint."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli import atomic
from gptcli.errors import ConfigError, DataError
from gptcli.tokenizers.base import (
    SAFE_CUT,
    ByteTokenizer,
    CharTokenizer,
    ChatTokens,
    Dtype,
    Ids,
    Tokenizer,
    Tokens,
    UnknownCharacters,
    dtype_for,
)
from gptcli.tokenizers.chat import (
    CHAT_TEMPLATE,
    END_OF_TURN,
    START_OF_TURN,
    Message,
    encode_conversation,
    with_chat_tokens,
)

if TYPE_CHECKING:
    from gptcli.config.schema import TokenizerConfig

__all__ = ["CHAT_TEMPLATE", "END_OF_TURN", "SAFE_CUT", "START_OF_TURN", "ByteTokenizer",
           "CharTokenizer", "ChatTokens", "Dtype", "Ids", "Message", "Tokenizer",
           "Tokens", "UnknownCharacters", "dtype_for", "dump_tokenizer", "encode_conversation",
           "is_learned", "load_tokenizer", "make_tokenizer", "tokenizer_from",
           "with_chat_tokens"]  # fmt: skip

_VERSION = 1
_MIN_BPE_SIZE = 257  # the bytes and end-of-text


def _gpt2() -> Tokenizer:
    from gptcli.tokenizers.bpe import gpt2  # which bytes and characters do not need

    return gpt2()


_FIXED: dict[str, Callable[[], Tokenizer]] = {"gpt2": _gpt2, "bytes": ByteTokenizer}


def is_learned(config: "TokenizerConfig") -> bool:
    """Tell whether the vocabulary is learned from the text that is prepared."""
    return config.name in ("char", "bpe") and config.path is None


def make_tokenizer(config: "TokenizerConfig", texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """Make the tokenizer that `config` names, from `texts()` where a vocabulary is learned."""
    if config.path is not None:
        return _from_path(config, Path(config.path))
    if config.name in _FIXED:
        return _FIXED[config.name]()
    from gptcli.tokenizers import bpe

    match config.name:
        case "char":
            return CharTokenizer.of(texts())
        case "bpe":
            from gptcli.config.schema import DEFAULT_BPE_SIZE  # not for workers, who start quickly

            size = config.vocab_size or DEFAULT_BPE_SIZE
            if size < _MIN_BPE_SIZE:
                raise ConfigError(
                    f"tokenizer.vocab_size: {size} is too small; bpe needs at least"
                    f" {_MIN_BPE_SIZE} (256 bytes and end-of-text)"
                )
            return bpe.train_bpe(texts(), size)
        case name:
            return bpe.from_tiktoken(name)


def _from_path(config: "TokenizerConfig", path: Path) -> Tokenizer:
    """Read a tokenizer file, or a character vocabulary from a text file."""
    if path.suffix != ".txt":
        tokenizer = load_tokenizer(path)
        if "name" in config.model_fields_set and tokenizer.name != config.name:
            raise ConfigError(
                f"tokenizer.path: {path} holds a '{tokenizer.name}' tokenizer, not '{config.name}'"
            )
        return tokenizer
    if config.name != "char":
        raise ConfigError(
            f"tokenizer.path: a text file such as {path} is a character vocabulary",
            "also set -s tokenizer.name=char",
        )
    try:
        return CharTokenizer.of([atomic.read_bytes(path).decode("utf-8-sig")])
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}") from error


def tokenizer_from(definition: dict[str, Any]) -> Tokenizer:
    """Make a tokenizer from its `definition()`; a DataError if that is not one of ours."""
    try:
        name = definition["name"]
        if name in _FIXED:
            tokenizer = _FIXED[name]()
        elif name == "char":
            tokenizer = CharTokenizer(definition["alphabet"])
        else:
            from gptcli.tokenizers import bpe

            tokenizer = bpe.from_definition(definition)
        if "chat" in definition:
            tokenizer = with_chat_tokens(tokenizer)
            if definition["chat"] != list(tokenizer.chat or ()):
                raise ValueError("the chat tokens are not the last two ids")
        return tokenizer
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"not a tokenizer definition ({type(error).__name__}: {error})") from error


def dump_tokenizer(tokenizer: Tokenizer) -> bytes:
    """Return the content of a `tokenizer.json`."""
    content = {"format": "gptcli-tokenizer", "version": _VERSION, **tokenizer.definition()}
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json`, or the one in a folder; a DataError if it is not one of ours."""
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        content = json.loads(atomic.read_bytes(file))
        if (content.pop("format"), content.pop("version")) != ("gptcli-tokenizer", _VERSION):
            raise ValueError("another format or version")
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{file}: not a tokenizer file of gptcli") from error
    try:
        return tokenizer_from(content)
    except DataError as error:
        raise DataError(f"{file}: {error.message}", error.hint) from error
