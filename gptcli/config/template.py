"""Texts made from the schema: a commented file to start from, and the reference page.

Knows nothing of the terminal or of where the texts go.
"""

import re
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gptcli.config.reference import EXTENDS, KeyInfo, keys, sections
from gptcli.config.yaml import flow, scalar

SCHEMA_FILE = "gptcli.schema.json"
EDITOR_LINE = f"# yaml-language-server: $schema={SCHEMA_FILE}\n"
# A small run on a text of one's own: what `config init` sets.
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
        lines += [f"\n# {about}\n", f"{section}:\n", *_settings(_direct(f"{section}."), "  ")]
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
    """Return a value as YAML that a person would write."""
    return flow(value, _needs_no_quotes)


def _needs_no_quotes(text: str) -> bool:
    is_word = _PLAIN.match(text) is not None and scalar(text) == text
    return is_word and text.lower() not in _YAML_1_1_BOOLEANS


def _direct(prefix: str) -> Iterable[KeyInfo]:
    """Return the keys right below `prefix`."""
    return (
        info
        for key, info in keys().items()
        if key.startswith(prefix) and "." not in key[len(prefix) :]
    )


def _settings(found: Iterable[KeyInfo], indent: str) -> list[str]:
    lines: list[str] = []
    for info in found:
        lines += _comment(f"{info.meaning} ({info.takes})", indent)
        name = info.key.rpartition(".")[2]
        value = STARTER.get(info.key)
        lines.append(
            f"{indent}#{name}: {to_yaml(info.default)}"
            if value is None
            else f"{indent}{name}: {to_yaml(value)}"
        )
    return lines


def _comment(text: str, indent: str) -> list[str]:
    return [f"{indent}# {line}" for line in textwrap.wrap(text, _WIDTH)]


def _rows(found: Iterable[KeyInfo], first: str = "") -> str:
    lines = "| key | takes | default | meaning |\n|---|---|---|---|\n" + first
    for info in found:
        cells = (f"`{info.key}`", info.takes, f"`{to_yaml(info.default)}`", info.meaning)
        lines += "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
    return lines
