"""The options that commands share, how they become a configuration, and other programs' options."""

import json
import shlex
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gptcli.commands import complete
from gptcli.errors import ConfigError
from gptcli.formatting import plural

if TYPE_CHECKING:
    from gptcli.config import Config

ConfigOption = Annotated[
    str | None,
    typer.Option(
        "--config",
        "-c",
        metavar="FILE|NAME",
        help="YAML file or name of a shipped example.",
        autocompletion=complete.configurations,
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="Override a key, e.g. optim.lr=3e-4.",
        autocompletion=complete.settings,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, even on failure.")]
CheckpointOption = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        metavar="PATH",
        help="File, run, gpt2, hf:org/name, or folder; default: the newest run's best.",
        autocompletion=complete.checkpoints,
    ),
]
RunArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="RUN", help="Run folder or name; default: the newest.", autocompletion=complete.runs
    ),
]
SplitOption = Annotated[Literal["train", "val"], typer.Option("--split", help="Data split.")]


def load(
    config: str | None,
    overrides: list[str] | None,
    flags: dict[str, Any] | None = None,
    base: dict[str, Any] | None = None,
) -> "Config":
    """Return the configuration of a command: file, then `--set`, then its own options."""
    from gptcli.config import load_config

    return load_config(config, overrides or [], flags, base)


def same_command(*add: str, drop: str = "") -> str:
    """Return this process's command line with one flag in place of another."""
    words = [word for word in sys.argv[1:] if word not in (*add, drop)]
    return shlex.join(["gpt", *words, *add])


def text_setting(key: str, value: str) -> str:
    """Return the KEY=VALUE that sets a text, quoted where YAML would read something else."""
    from gptcli.config.yaml import read_value

    try:
        is_plain = read_value(value) == value
    except ConfigError:
        is_plain = False
    return f"{key}={value if is_plain else json.dumps(value)}"


def command_for(name: str, config: str | None, overrides: list[str] | None) -> str:
    """Return the command line of another command with the same configuration."""
    words = ["gpt", name]
    if config is not None:
        words += ["-c", config]
    for override in overrides or []:
        words += ["-s", override]
    return shlex.join(words)


# Where a key of several sections is looked for, the likeliest first.
_SECTIONS = {
    "prepare": ("data", "tokenizer"),
    "train": ("train", "model", "optim"),
    "eval": ("train",),
    "generate": ("generate",),
}


def meant(
    typed: str, value: str | None, name: str, known: dict[str, bool]
) -> tuple[list[str], str] | None:
    """Return what to write for an option of another program, or one with a dash too few.

    Args:
        typed: The option, such as `--learning_rate` or `-batch_size`.
        value: The word after it.
        name: The command, such as `train`.
        known: The command's options, and whether each is a flag.

    Returns:
        The words to type, and a note on the value; None if nothing is known of the option.
    """
    from gptcli.config import words
    from gptcli.config.reference import keys

    word = words.plain(typed)
    if (why := words.NEEDLESS.get(word)) and word not in words.OPTIONS["--workers"]:
        return [], f"leave {typed} out: {why}"
    key = _key_of(word, _SECTIONS.get(name, ("",)))
    candidates = [f"--{word.replace('_', '-')}"]
    candidates += [option for option, others in words.OPTIONS.items() if word in others.split()]
    if key is not None:
        candidates.append(f"--{key.rpartition('.')[2].replace('_', '-')}")
    if word == "init_from" and value == "resume":
        candidates.insert(0, "--resume")
    note, fixed = words.note_for(word), words.VALUES.get(word)
    value = fixed or ("VALUE" if value is None or note else value)
    note = "" if note == fixed else note
    for option in candidates:
        if option in known:
            return [option, *([] if known[option] else [value])], note
    if key == "data.source" and name == "prepare":
        return [value], note
    if key is None or "--set" not in known:
        return None
    value = f"[{value}]" if isinstance(keys()[key].default, list) else value
    return ["-s", f"{key}={value}"], note


def _key_of(word: str, sections: tuple[str, ...]) -> str | None:
    """Return the key that a word means, of several the one in the first of `sections`."""
    from gptcli.config import words
    from gptcli.config.reference import find_key, keys

    if (key := words.key_for(word, sections[0])) is not None:
        return key
    with suppress(ConfigError):
        return find_key(word).key
    return next((f"{part}.{word}" for part in sections if f"{part}.{word}" in keys()), None)


def skipped_rows(skipped: dict[str, dict[str, Any]], what: str = "row") -> str:
    """Return how many rows were skipped for which reason, and where the first of each is."""
    return ", ".join(
        f"{plural(each['rows'], what)}: {reason} (first: {each['first']})"
        for reason, each in skipped.items()
    )
