"""The shipped examples, the data each is for, and the command that follows `gpt prepare`."""

import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from gptcli.commands import options
from gptcli.terminal import console

if TYPE_CHECKING:
    from gptcli.api.prepare import Prepared
    from gptcli.config import Config

# Below this, a model of GPT-2's size only memorizes the text, and takes hours for it.
_SMALL_TOKENS = 5_000_000
_SMALL = (
    "model.n_layer=6", "model.n_head=6", "model.n_embd=384", "train.max_epochs=10",
)  # fmt: skip


def table() -> list[tuple[str, str, str]]:
    """Return (name, data, what it is in a few words) of each example."""
    from gptcli.config.loader import example_files
    from gptcli.config.render import about_example

    rows = []
    for path in example_files():
        config = _load_all()[path.stem].data
        source = config.source
        if config.mix is not None:
            source = " + ".join(each.source for each in config.mix)
        data = source or "-" if isinstance(source, str | None) else "two text files"
        rows.append((path.stem, data, about_example(path).partition(": ")[0].rstrip(".")))
    return rows


def named_for(source: str) -> list[str]:
    """Return the examples that name `source` as their data."""
    return [name for name, config in _load_all().items() if config.data.source == source]


def trains_on(config: "Config") -> str | None:
    """Return the one example that trains on just what `config`, without an example, prepares."""
    from gptcli.data.presets import data_dir

    others = {"seq_len", "stride", "dir", "keep_downloads"}  # which change no shard

    def data(config: "Config") -> tuple[object, ...]:
        same = config.data.model_dump(exclude=others)
        return data_dir(config.data), config.tokenizer, same

    names = named_for(config.data.source) if isinstance(config.data.source, str) else []
    names = [name for name in names if data(_load_all()[name]) == data(config)]
    return names[0] if len(names) == 1 else None


@cache
def _load_all() -> "dict[str, Config]":
    from gptcli.config import load_config
    from gptcli.config.loader import example_files

    return {path.stem: load_config(str(path)) for path in example_files()}


def next_command(
    done: "Prepared", loaded: "Config", config: str | None, overrides: list[str] | None
) -> str | None:
    """Return the command that trains on the data; None, with a warning, if they are too short."""
    tokens, folder = done.manifest.tokens, done.folder
    name, settings = config or trains_on(loaded), [*(overrides or [])]
    longest = min(tokens.train, tokens.val or tokens.train) - 1
    if done.manifest.is_chat:  # whose rows are filled up
        longest = sys.maxsize
    if loaded.data.mix is not None:
        return options.command_for("train", config, settings)
    if name is not None:
        settings += _data_settings(folder, loaded, name, settings)
        loaded = options.load(name, settings)
    else:
        trained = ("data.seq_len=", "data.stride=")
        settings = [s for s in settings if not s.startswith("data.") or s.startswith(trained)]
        settings.append(options.text_setting("data.dir", folder.as_posix()))
        if longest > 0:
            if not any(s.startswith(("model.", "train.", "data.seq_len=")) for s in settings):
                if done.manifest.is_chat and done.manifest.tokenizer.name == "gpt2":
                    settings.append("model.init_from=gpt2")
                elif tokens.train < _SMALL_TOKENS:
                    settings += [*_SMALL, f"model.block_size={min(128, longest)}"]
            elif longest < loaded.seq_len and not loaded.is_set("model.block_size"):
                settings.append(f"model.block_size={longest}")
        loaded = options.load(None, settings)
    if longest < loaded.seq_len:
        remedy = f", or set data.seq_len to {longest} or less" if longest > 0 else ""
        console.message(
            f"warning: the text is too short to train on: {tokens.train:,} training and"
            f" {tokens.val:,} validation tokens, but a window of seq_len {loaded.seq_len:,} takes"
            f" {loaded.seq_len + 1:,}; use more text{remedy}",
            "bold red",
        )
        return None
    return options.command_for("train", name, settings)


def _data_settings(folder: Path, loaded: "Config", config: str, overrides: list[str]) -> list[str]:
    """Return what must be added to `config` for it to train on the folder."""
    from gptcli.data.presets import STDIN, data_dir

    data = options.load(config, overrides).data
    found: list[str] = []
    source = loaded.data.source
    if isinstance(source, str) and source not in (data.source, STDIN):
        found.append(options.text_setting("data.source", source))
        data = data.model_copy(update={"source": source})
    if (data.dir is None and data.source is None) or data_dir(data) != folder:
        found.append(options.text_setting("data.dir", folder.as_posix()))
    return found
