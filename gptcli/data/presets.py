"""Presets: datasets known by name; and which folder a source of any name is prepared in.

Revisions are pinned: the same command reads the same bytes in a year. Counts are those of a
complete preparation, so that one that lost something is noticed.
"""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gptcli.config.schema import DataConfig, DataFormat, SplitSource
from gptcli.errors import ConfigError


@dataclass(frozen=True)
class Expected:
    """Counts of a complete preparation, as far as they are known."""

    documents: int | None = None
    gpt2_tokens: int | None = None  # one end-of-text for each document included
    own_val_documents: int = 0  # of the documents, those of the dataset's own validation split


@dataclass(frozen=True)
class Preset:
    """A named dataset: where its text is, and what to expect of it."""

    name: str
    # "rows" are documents, "lines" are lines of one document (joined as they are), "file" is one
    # text on the web, "shards" are ready-made tokens, "library" is this Python's.
    kind: Literal["library", "rows", "lines", "file", "shards"]
    where: str  # `org/name` on the Hub, or the web address
    config: str | None
    revision: str | None
    download_bytes: int
    licence: str
    about: str
    expected: Expected = Expected()
    text_field: str = "text"
    format: DataFormat = "text"
    n_shards: int | None = None  # training files of ready-made tokens; `name:N` takes the first N


_WIKITEXT = ("Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3")

_ALL = (
    Preset("stdlib", "library", "", None, None, 0, "PSF-2.0",
           "Python's standard library: the sources and the language reference"),
    Preset("stdlib-chat", "library", "", None, None, 0, "PSF-2.0",
           "questions about Python's standard library, answered by its docstrings",
           format="docstrings"),
    Preset("shakespeare", "file",
           "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare"
           "/input.txt", None, None, 1_115_394, "public domain",
           "some of Shakespeare's plays, the classic text for character models", Expected(1)),
    Preset("openwebtext", "rows", "Skylion007/openwebtext", "plain_text",
           "79d93d786212f7344586290adb811d4ae6a1762c", 24_193_092_408, "CC0-1.0",
           "web pages linked from Reddit, like GPT-2's training data",
           Expected(8_013_769, 9_040_017_095)),
    Preset("tinystories", "rows", "roneneldan/TinyStories", "default",
           "f54c09fd23315a6f9c86f9dc80f725de7d8f9c64", 1_000_775_442, "CDLA-Sharing-1.0",
           "short stories in simple words, for small children",
           Expected(2_119_719 + 21_990, own_val_documents=21_990)),
    Preset("wikipedia", "rows", "wikimedia/wikipedia", "20231101.en",
           "b04c8d1ceb2f5cd4588862100d08de323dccfbaa", 11_630_929_031, "CC-BY-SA-3.0",
           "the English Wikipedia; wikipedia:20231101.de is the German one, and so on",
           Expected(6_407_814)),
    Preset("fineweb", "rows", "HuggingFaceFW/fineweb", "sample-10BT",
           "9bb295ddab0e05d785b879661af7260fed5140fc", 30_639_384_917, "ODC-By-1.0",
           "filtered web pages, a sample of 10 billion tokens", Expected(14_868_862)),
    Preset("fineweb-edu", "rows", "HuggingFaceFW/fineweb-edu", "sample-10BT",
           "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9", 28_518_193_415, "ODC-By-1.0",
           "educational web pages, a sample of 10 billion tokens", Expected(9_672_101)),
    Preset("wikitext-103", "lines", _WIKITEXT[0], "wikitext-103-raw-v1", _WIKITEXT[1],
           314_077_000, "CC-BY-SA-3.0", "Good and Featured Wikipedia articles, a common benchmark"),
    Preset("wikitext-2", "lines", _WIKITEXT[0], "wikitext-2-raw-v1", _WIKITEXT[1],
           7_000_000, "CC-BY-SA-3.0", "the small version of wikitext-103"),
    Preset("smol-smoltalk", "rows", "HuggingFaceTB/smol-smoltalk", "default",
           "06f445222cefca1ef920c9f67c69862a68fe1e13", 923_000_000, "Apache-2.0",
           "conversations for models below 1B parameters, on everyday and simple technical topics",
           Expected(460_341), format="messages"),
    Preset("slimorca", "rows", "Open-Orca/SlimOrca", None,
           "ce9ed009ef3292bac33d3520afaf5ec804066120", 986_000_000, "MIT",
           "instructions answered by GPT-4 with explanations", format="conversations"),
    Preset("fineweb10B-gpt2", "shards", "kjj0/fineweb10B-gpt2", None,
           "889765ea1f903759787add96995d81171b632d0c", 20_800_000_000, "ODC-By-1.0",
           "fineweb as ready-made gpt2 tokens; fineweb10B-gpt2:1 is the first 100 million",
           n_shards=103),
)  # fmt: skip

STDIN = "-"
PRESETS = {preset.name: preset for preset in _ALL}


def source_name(source: str | SplitSource) -> str:
    """Return the name of a source's data folder: data/<name>."""
    if isinstance(source, SplitSource):
        return source_name(source.train)
    if source == STDIN:
        return "stdin"
    if source in PRESETS:
        return source
    if is_named(source):
        return _folder_name(source.removeprefix("hf:").rpartition("/")[2])
    from gptcli.data.archives import bare_name

    path = Path(re.split(r"[*?\[]", source)[0])  # a glob's fixed part
    name = path.name if path.is_dir() else Path(bare_name(path.name)).stem
    return _folder_name(path.resolve().name if name in ("", "..") else name)


def _folder_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip("-.") or "text"


def is_address(name: object) -> bool:
    """Tell whether a name is an address, such as https://host/file."""
    return isinstance(name, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", name) is not None


def folder_at(name: str) -> Path:
    """Return a data folder by its path, or the one that stands for an address."""
    if not is_address(name):
        return Path(name)
    from gptcli.data import remote

    return remote.folder_of(remote.require_address(name, "data.dir"))


def data_dir(config: DataConfig) -> Path:
    """Return the folder of the shards; a ConfigError if neither dir nor source is set."""
    for name in _names(config.source):
        if is_address(name):
            from gptcli.data import remote

            remote.require_address(name, "data.source")
    if config.dir is not None:
        return folder_at(config.dir)
    if not config.source:
        raise ConfigError(
            "neither data.source nor data.dir is set: there is no data to work on",
            "e.g. gpt prepare stdlib, then -s data.dir=data/stdlib",
        )
    return Path("data") / source_name(config.source)


def is_named(source: str) -> bool:
    """Tell whether `source` is a preset or a Hub dataset, perhaps with `:part` after it."""
    return source.startswith("hf:") or source.partition(":")[0] in PRESETS


def is_local(config: DataConfig) -> bool:
    """Tell whether `data.source` names text that is on this machine."""
    local = {name for name, preset in PRESETS.items() if preset.kind == "library"}
    return config.source is not None and all(
        part.partition(":")[0] in local or not (is_named(part) or is_address(part))
        for part in _names(config.source)
    )


def _names(source: str | SplitSource | None) -> list[str]:
    if isinstance(source, SplitSource):
        return [source.train, source.val]
    return [] if source is None else [source]


def unknown_part(source: str, message: str) -> ConfigError:
    """Make the error for a subset that a dataset does not have, from the library's message."""
    listed = re.search(r"\[('[^\]]*')\]", message)
    if listed is None:
        return ConfigError(f"{source}: {(message.splitlines() or [''])[0][:200]}")
    names = re.findall(r"'([^']*)'", listed[1])
    shown = ", ".join(f"'{name}'" for name in names[:10])
    shown += f" and {len(names) - 10} more" if len(names) > 10 else ""
    requested = re.search(r"BuilderConfig '([^']*)' not found", message)
    if requested is None:
        several = f"{source} has several parts: {shown}"
        return ConfigError(several, f"name one, as {source}:{names[0]}")
    near = difflib.get_close_matches(requested[1], names, 1)
    hint = f"did you mean '{near[0]}'?" if near else None
    return ConfigError(f"{source}: no part named '{requested[1]}', but {shown}", hint)
