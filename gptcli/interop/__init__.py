"""Weights and files of other programs: Hugging Face folders, nanoGPT's checkpoints, GGUF."""

from enum import StrEnum


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
