"""The command that comes after `gpt prepare`: it trains on just what was prepared."""

from pathlib import Path
from typing import TYPE_CHECKING

from gptcli.commands import examples, options
from gptcli.terminal import console

if TYPE_CHECKING:
    from gptcli.config import Config
    from gptcli.data.shards import Manifest


def next_command(
    folder: Path,
    manifest: "Manifest",
    loaded: "Config",
    config: str | None,
    overrides: list[str] | None,
) -> str | None:
    """Return the command that trains on the folder; None, with a warning, if it is too short."""
    name, settings = config, [*(overrides or [])]
    if config is None:
        name = examples.trains_on(loaded)
    if name is not None:
        settings += _data_settings(folder, loaded, name, settings)
        loaded = options.load(name, settings)
    else:
        trained = ("data.seq_len=", "data.stride=")
        settings = [s for s in settings if not s.startswith("data.") or s.startswith(trained)]
        settings.append(options.text_setting("data.dir", folder.as_posix()))
    longest = min(manifest.tokens.train, manifest.tokens.val or manifest.tokens.train) - 1
    if name is None and longest > 0:
        if not any(s.startswith(("model.", "train.", "data.seq_len=")) for s in settings):
            settings += examples.smaller_network(manifest.tokens.train, longest)
        elif longest < loaded.seq_len and not loaded.is_set("model.block_size"):
            settings.append(f"model.block_size={longest}")
        loaded = options.load(None, settings)
    if longest < loaded.seq_len:
        remedy = f", or set data.seq_len to {longest} or less" if longest > 0 else ""
        console.message(
            f"warning: the text is too short to train on: {manifest.tokens.train:,} tokens to train"
            f" on and {manifest.tokens.val:,} to validate, but a window of seq_len"
            f" {loaded.seq_len:,} takes {loaded.seq_len + 1:,}; use more text{remedy}",
            "bold red",
        )
        return None
    return options.command_for("train", name, settings)


def _data_settings(folder: Path, loaded: "Config", config: str, overrides: list[str]) -> list[str]:
    """Return what must be added to `config` for it to train on the folder."""
    from gptcli.data.sources import STDIN, data_dir

    data = options.load(config, overrides).data
    found: list[str] = []
    source = loaded.data.source
    if isinstance(source, str) and source not in (data.source, STDIN):
        found.append(options.text_setting("data.source", source))
        data = data.model_copy(update={"source": source})
    if (data.dir is None and data.source is None) or data_dir(data) != folder:
        found.append(options.text_setting("data.dir", folder.as_posix()))
    return found
