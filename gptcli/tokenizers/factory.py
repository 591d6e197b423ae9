"""From a configuration or a stored definition to a tokenizer."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptcli import atomic
from gptcli.errors import ConfigError, DataError
from gptcli.tokenizers import bpe
from gptcli.tokenizers.base import Alphabet, Tokenizer
from gptcli.tokenizers.simple import ByteTokenizer, CharTokenizer

if TYPE_CHECKING:
    from gptcli.config.schema import TokenizerConfig

FORMAT_VERSION = 1
_DEFAULT_BPE_SIZE = 4096
_SMALLEST_BPE_SIZE = 257  # the bytes and end-of-text


def make_tokenizer(config: "TokenizerConfig", texts: Callable[[], Iterable[str]]) -> Tokenizer:
    """Make the tokenizer that `config` names.

    Args:
        config: The section of the configuration.
        texts: Gives the text to learn an alphabet or a vocabulary from, where one is learned.

    Raises:
        ConfigError: Unknown name, or a size no vocabulary can have.
    """
    if config.path is not None and Path(config.path).suffix == ".txt":
        return _char_tokenizer(config)
    if config.path is not None:
        loaded = load_tokenizer(Path(config.path))
        if "name" in config.model_fields_set and loaded.name != config.name:
            raise ConfigError(
                f"tokenizer.path: {config.path} holds a '{loaded.name}' tokenizer,"
                f" not '{config.name}'"
            )
        return loaded
    match config.name:
        case "gpt2":
            return bpe.gpt2()
        case "bytes":
            return ByteTokenizer()
        case "char":
            alphabet = Alphabet()
            for text in texts():
                alphabet.add(text)
            return CharTokenizer(str(alphabet))
        case "bpe":
            size = config.vocab_size or _DEFAULT_BPE_SIZE
            if size < _SMALLEST_BPE_SIZE:
                raise ConfigError(
                    f"tokenizer.vocab_size: {size} is too small; bpe needs at least"
                    f" {_SMALLEST_BPE_SIZE} (256 bytes and end-of-text)"
                )
            return bpe.train_bpe(texts(), size)
        case name:
            return bpe.from_tiktoken(name)


def _char_tokenizer(config: "TokenizerConfig") -> CharTokenizer:
    """Make a character vocabulary of all that stands in a text file."""
    if config.name != "char":
        raise ConfigError(
            f"tokenizer.path: a text file such as {config.path} is a character vocabulary",
            "set -s tokenizer.name=char beside it",
        )
    alphabet = Alphabet()
    try:
        alphabet.add(atomic.read_bytes(Path(config.path or "")).decode("utf-8-sig"))
    except OSError as error:
        raise DataError(f"{config.path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{config.path}: not UTF-8 at byte {error.start}") from error
    return CharTokenizer(str(alphabet))


def tokenizer_from(definition: dict[str, Any]) -> Tokenizer:
    """Make a tokenizer again from `Tokenizer.definition()`.

    Raises:
        DataError: The definition is not one of ours.
    """
    try:
        match definition["name"]:
            case "gpt2":
                return bpe.gpt2()
            case "bytes":
                return ByteTokenizer()
            case "char":
                return CharTokenizer(definition["alphabet"])
            case _:
                return bpe.from_definition(definition)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"not a tokenizer definition ({type(error).__name__}: {error})") from error


def dump_tokenizer(tokenizer: Tokenizer) -> bytes:
    """Return the content of a `tokenizer.json`."""
    content = {"format": "gptcli-tokenizer", "version": FORMAT_VERSION, **tokenizer.definition()}
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a `tokenizer.json`, or the one in the folder `path`.

    Raises:
        DataError: The file is missing or not one of ours.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        content = json.loads(atomic.read_bytes(file))
        if content.pop("format") != "gptcli-tokenizer" or content.pop("version") != FORMAT_VERSION:
            raise ValueError("another format or version")
    except OSError as error:
        raise DataError(f"{file}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{file}: not a tokenizer file of gptcli") from error
    try:
        return tokenizer_from(content)
    except DataError as error:
        raise DataError(f"{file}: {error.message}", error.hint) from error
