"""Command lines: what they print and return, and whether what they advise works."""

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptcli import cli
from gptcli.config import load_config
from gptcli.config.loader import example_files
from gptcli.config.reference import keys
from gptcli.errors import ConfigError

# A command of ours as it is printed: in backticks, or on lines that say what comes next.
COMMAND = re.compile(r"`(gpt(?:cli)? [a-z][^`]*)`|^(?:next: |      )(gpt [a-z].*)$", re.MULTILINE)
SETTING = re.compile(r"(?<![\w-])-s '?([\w.]+)=")
EAGER = ("--help", "--version", "--install-completion")  # they print and end
PLACEHOLDER = re.compile(r"\.\.\.|VALUE|PLACE|=[A-Z]+$")


@dataclass
class Result:
    """What a command line printed and returned."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout."""
        found: dict[str, Any] = json.loads(self.out)
        return found

    @property
    def err_lines(self) -> list[str]:
        """The lines on stderr."""
        return self.err.splitlines()


Gpt = Callable[..., Result]


def require_understood(words: list[str]) -> None:
    """Refuse a command line behind `gpt` that our parser or the schema refuses.

    Files that it names need not be there, and a value with a placeholder is not looked at.
    """
    words = [word for word in words if word not in EAGER]
    if not words:
        return
    command: Any = cli._command()
    context = command.make_context("gpt", words)
    while hasattr(command, "commands"):
        rest = [*context._protected_args, *context.args]
        if not rest:
            return  # the name of a group
        name, command, rest = command.resolve_command(context, rest)
        if not rest and not hasattr(command, "commands"):
            return  # `gpt export` is the name of a command, whatever it requires
        context = command.make_context(name, rest, parent=context)
    config = context.params.get("config")
    shipped = {path.stem for path in example_files()}
    is_there = config in shipped or Path(config or "").is_file()
    overrides = context.params.get("set_") or []
    for override in overrides:
        if (key := override.partition("=")[0]) not in keys():
            raise ConfigError(f"unknown key '{key}'")
    whole = [text for text in overrides if not PLACEHOLDER.search(text)]
    if is_there or config is None:
        load_config(config, whole)


def require_good_advice(text: str) -> None:
    """Refuse printed commands and settings of `next:`, `hint:` and notes that do not work here."""
    for command in COMMAND.findall(text):
        for part in re.split(r" (?:&&|\|) ", "".join(command)):
            program, *words = shlex.split(part, comments=True)
            assert program in ("gpt", "gptcli"), part
            require_understood(words)
    for line in text.splitlines():
        for key in SETTING.findall(line) if line.startswith(("hint:", "usual:", "next:")) else []:
            assert key in keys(), line
