"""A configuration as people read it: YAML, the commented starter file, the reference page, and what
each null becomes, as far as that is known before any data or device is looked at.
"""

import re
import textwrap
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from gptcli.config.reference import EXTENDS, KeyInfo, keys, sections
from gptcli.config.schema import Config
from gptcli.config.yaml import flow, scalar

SCHEMA_FILE = "gptcli.schema.json"
EDITOR_LINE = f"# yaml-language-server: $schema={SCHEMA_FILE}\n"
# A small run on the user's own text: what `config init` sets.
STARTER: dict[str, Any] = {
    "data.source": "input.txt",
    "tokenizer.name": "char",
    "model.n_layer": 6,
    "model.n_head": 6,
    "model.n_embd": 384,
    "model.block_size": 256,
    "model.dropout": 0.2,
    "train.max_steps": 5000,
    "train.micro_batch_size": 64,
    "optim.lr": 1e-3,
    "optim.warmup_steps": 100,
}
_HEAD = """\
# A run of gptcli. Lines that begin with `#name:` show defaults: take the # away to change one.
# `gpt config explain KEY` says more about a key, `gpt config show -c {file}` what is in force.
#   gpt train -c {file}
#   gpt generate

"""
_WIDTH = 92
_PLAIN = re.compile(r"[A-Za-z_][\w./~-]*\Z")
_YAML_1_1_BOOLEANS = {"y", "n", "yes", "no", "on", "off"}
_PAGE = """\
# The configuration

Every key of the one YAML file that `gpt prepare`, `train`, `eval` and `generate` share. Defaults
come first, then the file that `extends:` names, then the file itself (`-c FILE`, or the name of a
shipped example), then `-s KEY=VALUE`. `null` means "derived"; each key says how.
`gpt config explain KEY` says the same in a terminal, and `gpt config show` what a run would use.

This page is written by `gpt config schema --markdown -o docs/config.md`; a test compares them.
"""


def commented_file(file: str) -> str:
    """Return a YAML file of all keys with their meaning; only the starter's are set.

    Args:
        file: Its name, for the commands in its head.
    """
    lines = [EDITOR_LINE + _HEAD.format(file=file)]
    lines += [*_comment(EXTENDS, ""), "#extends: base.yaml\n"]
    lines += _settings(_direct(""), "")
    for section, about in sections().items():
        lines += [f"\n# {about}\n", f"{section}:\n", *_settings(_direct(section), "  ")]
    return "".join(line if line.endswith("\n") else line + "\n" for line in lines)


def about_example(path: Path) -> str:
    """Return the line that says what a shipped example is: its first comment."""
    lines = path.read_text(encoding="utf-8").removeprefix(EDITOR_LINE).splitlines()
    return lines[0].strip("# ") if lines else ""


def reference_page() -> str:
    """Return the page of all keys, in Markdown."""
    parts = [_PAGE]
    top = list(_direct(""))
    parts.append("\n## Top level\n\n" + _rows(top, f"| `extends` | text |  | {EXTENDS} |\n"))
    for section, about in sections().items():
        found = [info for key, info in keys().items() if key.startswith(f"{section}.")]
        parts.append(f"\n## `{section}`\n\n{about}\n\n" + _rows(found))
    return "".join(parts)


def to_yaml(value: Any) -> str:
    """Return a value as YAML that a person would write: 6.0e-05, not 5.9999999999999995e-05."""
    value = float(f"{value:.12g}") if isinstance(value, float) else value
    return flow(value, _needs_no_quotes)


def _needs_no_quotes(text: str) -> bool:
    is_word = _PLAIN.match(text) is not None and scalar(text) == text
    return is_word and text.lower() not in _YAML_1_1_BOOLEANS


def _direct(section: str) -> Iterable[KeyInfo]:
    return (info for info in keys().values() if info.key.rpartition(".")[0] == section)


def _settings(found: Iterable[KeyInfo], indent: str) -> list[str]:
    lines: list[str] = []
    for info in found:
        lines += _comment(f"{info.meaning} ({info.takes})", indent)
        name, sign = info.key.rpartition(".")[2], "" if info.key in STARTER else "#"
        lines.append(f"{indent}{sign}{name}: {to_yaml(STARTER.get(info.key, info.default))}")
    return lines


def _comment(text: str, indent: str) -> list[str]:
    return [f"{indent}# {line}" for line in textwrap.wrap(text, _WIDTH)]


def _rows(found: Iterable[KeyInfo], first: str = "") -> str:
    lines = "| key | takes | default | meaning |\n|---|---|---|---|\n" + first
    for info in found:
        cells = (f"`{info.key}`", info.takes, f"`{to_yaml(info.default)}`", info.meaning)
        lines += "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
    return lines


DEFAULT_BPE_SIZE = 4096
_VOCAB_SIZES = {"gpt2": 50257, "bytes": 257}
# What an automatic choice depends on.
_AUTO = {
    "device": "the first available of cuda, mps, cpu",
    "dtype": "16 bits where that is fast; eval float32",
    "compile": "if the run is long enough to repay it",
    "deterministic": False,
    "train.micro_batch_size": "the largest that fits in memory",
    "train.async_save": "on cuda",
    "train.parallel": "ddp, or fsdp where that is needed",
}


def derived(config: Config, data_dir: str | None = None) -> dict[str, Any]:
    """Return, by key, what each null or automatic value of `config` becomes.

    Args:
        config: The configuration.
        data_dir: The folder that a null `data.dir` stands for, if there is a source.

    Returns:
        Plain values where they follow from the configuration, else a few words. Keys whose null
        simply means "none" are left out.
    """
    known = _known(config, data_dir)
    if config.tokenizer.name != "bpe" or config.tokenizer.path is not None:
        known["tokenizer.vocab_size"] = None
    becomes: dict[str, Any] = {}
    for key, info in keys().items():
        value = config.get(key)
        if value is None and not key.startswith("model.lora."):
            becomes[key] = known.get(key, info.null_means)
        elif value == "auto":
            becomes[key] = _AUTO[key]
        if key.startswith("model.") and not config.model.is_whole and not config.is_set(key):
            becomes[key] = f"as in {config.model.init_from}"
    return {key: value for key, value in becomes.items() if value is not None}


def _known(config: Config, data_dir: str | None) -> dict[str, Any]:
    folder = data_dir.replace("\\", "/").rstrip("/") if data_dir else None
    name = config.name or (folder.rpartition("/")[2] if folder else "run")
    max_epochs = config.train.max_epochs
    values = {
        "name": name,
        "run_dir": f"runs/{name}",
        "tokenizer.vocab_size": DEFAULT_BPE_SIZE,
        "train.max_steps": "one epoch" if max_epochs is None else f"{max_epochs:g} epochs",
        "optim.min_lr": config.min_lr,
    }
    if folder is not None:
        values["data.dir"] = folder
    if not config.model.is_whole:
        return values
    values |= {"data.seq_len": config.seq_len, "data.stride": config.stride}
    values |= {f"model.{key}": value for key, value in config.model.resolved()}
    if config.train.micro_batch_size != "auto":
        values["train.tokens_per_step"] = config.tokens_per_step
    if config.tokenizer.path is None and config.tokenizer.name in _VOCAB_SIZES:
        values["model.vocab_size"] = _VOCAB_SIZES[config.tokenizer.name]
    return values


def explicit_settings(
    settings: Mapping[str, object], given: Collection[str] | None
) -> dict[str, object]:
    """Return the settings of a run that somebody changed from the defaults.

    Args:
        settings: Every settled value by its dotted key, as config.yaml has them.
        given: The keys that were set; where that is unknown, those that no null or auto decides.
    """
    known = keys()

    def is_given(key: str) -> bool:
        if given is not None:
            return key in given and key not in ("name", "run_dir")
        return known[key].default != "auto" and known[key].null_means is None

    return {
        key: value
        for key, value in settings.items()
        if key not in known or (is_given(key) and value != known[key].default)
    }
