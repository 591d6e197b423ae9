"""Weights and files of other programs: Hugging Face folders, nanoGPT's checkpoints, GGUF."""

import importlib
from enum import StrEnum
from typing import Any

from gptcli.errors import ConfigError


class Format(StrEnum):
    """What `gpt export` writes; the module of a format is named in `export.TARGETS`."""

    HF = "hf"
    GGUF = "gguf"
    NANOGPT = "nanogpt"


class FileDtype(StrEnum):
    """The precisions of a GGUF file."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    Q8_0 = "q8_0"


def optional_package(name: str, option: str, extra: str) -> Any:
    """Import a package that an option needs; a ConfigError says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        hint = f"install it: pip install 'gptcli[{extra}]'"
        raise ConfigError(f"{option} needs the package {name.replace('_', '-')}", hint) from error
