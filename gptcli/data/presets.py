"""Data sets with a name of their own.

Revisions are pinned: the same command reads the same bytes in a year.
"""

import difflib
from dataclasses import dataclass

from gptcli.errors import ConfigError


@dataclass(frozen=True)
class Preset:
    """A named data set: where its text is, and what to expect of it."""

    name: str
    repository: str | None
    """`org/name` on the Hub; None for text that every machine has."""
    config: str | None
    revision: str | None
    text_field: str
    download_bytes: int
    licence: str
    about: str


_ALL = (
    Preset("stdlib", None, None, None, "text", 0, "PSF-2.0",
           "this Python's own library: its sources and its language reference"),
    Preset("openwebtext", "Skylion007/openwebtext", "plain_text",
           "79d93d786212f7344586290adb811d4ae6a1762c", "text", 24_193_092_408, "CC0-1.0",
           "web pages linked from Reddit, as GPT-2 was trained on"),
    Preset("tinystories", "roneneldan/TinyStories", "default",
           "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64", "text", 1_000_775_442, "CDLA-Sharing-1.0",
           "short stories in a small child's words"),
    Preset("wikipedia", "wikimedia/wikipedia", "20231101.en",
           "b04c8d1ceb2f5cd4588862100d08de323dccfbaa", "text", 11_630_929_031, "CC-BY-SA-3.0",
           "the English Wikipedia of November 2023"),
    Preset("fineweb", "HuggingFaceFW/fineweb", "sample-10BT",
           "9bb295ddab0e05d785b879661af7260fed5140fc", "text", 30_639_384_917, "ODC-By-1.0",
           "filtered web pages, a sample of 10 billion tokens"),
    Preset("fineweb-edu", "HuggingFaceFW/fineweb-edu", "sample-10BT",
           "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9", "text", 28_518_193_415, "ODC-By-1.0",
           "educational web pages, a sample of 10 billion tokens"),
)  # fmt: skip

PRESETS = {preset.name: preset for preset in _ALL}


def unknown_preset(name: str) -> ConfigError:
    """Make the error for a name that is neither a preset nor a path."""
    near = difflib.get_close_matches(name, PRESETS, 1)
    return ConfigError(
        f"no preset, file or folder is named '{name}'",
        f"did you mean '{near[0]}'?" if near else f"presets: {', '.join(PRESETS)}",
    )
