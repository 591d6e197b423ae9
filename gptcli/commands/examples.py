"""The shipped examples as commands speak of them: which data each is for, and which fits a folder.

Knows nothing of how data is prepared or networks are trained.
"""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptcli.config import Config

# Below this, GPT-2's size takes hours to learn a text by heart.
_SMALL_TOKENS = 5_000_000
_SMALL = (
    "model.n_layer=6", "model.n_head=6", "model.n_embd=384", "train.max_epochs=10",
)  # fmt: skip


def table() -> list[tuple[str, str, str]]:
    """Return (name, data, what it is in a few words) of each example."""
    from gptcli.config.loader import example_files
    from gptcli.config.template import about_example

    return [
        (path.stem, _data_of(path.stem), about_example(path).partition(": ")[0].rstrip("."))
        for path in example_files()
    ]


def _data_of(example: str) -> str:
    from gptcli.config.schema import SplitSource

    source = _load_all()[example].data.source
    return "two text files" if isinstance(source, SplitSource) else source or "-"


def named_for(source: str) -> list[str]:
    """Return the examples that name `source` as their data."""
    return [name for name, config in _load_all().items() if config.data.source == source]


def trains_on(config: "Config") -> str | None:
    """Return the example that trains on just what `config` prepares, if there is one.

    Args:
        config: What was given to `gpt prepare`, without an example.
    """
    source = config.data.source
    names = named_for(source) if isinstance(source, str) else []
    found = [name for name in names if _same_data(_load_all()[name], config)]
    return found[0] if len(found) == 1 else None


def smaller_network(n_tokens: int, longest: int) -> list[str]:
    """Return the settings of a model for a text of `n_tokens`; none where GPT-2's size fits.

    Args:
        n_tokens: Tokens to train on.
        longest: The longest context of which both splits hold a window.
    """
    if n_tokens >= _SMALL_TOKENS:
        return []
    return [*_SMALL, f"model.block_size={min(128, longest)}"]


@cache
def _load_all() -> "dict[str, Config]":
    from gptcli.config import load_config
    from gptcli.config.loader import example_files

    return {path.stem: load_config(str(path)) for path in example_files()}


def _same_data(example: "Config", config: "Config") -> bool:
    """Tell whether two configurations prepare the same folder in the same way."""
    from gptcli.data.sources import data_dir

    kept = {"seq_len", "stride", "dir", "keep_downloads"}
    return (
        Path(data_dir(example.data)) == Path(data_dir(config.data))
        and example.tokenizer == config.tokenizer
        and example.data.model_dump(exclude=kept) == config.data.model_dump(exclude=kept)
    )
