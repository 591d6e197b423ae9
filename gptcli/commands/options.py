"""The options that commands share, and how they become a configuration."""

import contextlib
import gc
import json
import shlex
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gptcli.commands import complete
from gptcli.errors import ConfigError
from gptcli.formatting import plural

if TYPE_CHECKING:
    from gptcli.config import Config


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Import what needs torch without looking for garbage, then or later, among what it makes.

    Its 250,000 objects stay, and to look at them takes a tenth of the time to a first token.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def offered(offers: Any, metavar: str, help_: str, *names: str) -> Any:
    """Return an option, or without names an argument, whose values Tab completes."""
    kind: Any = typer.Option if names else typer.Argument
    return kind(*names, metavar=metavar, help=help_, autocompletion=offers)


ConfigOption = Annotated[
    str | None,
    offered(
        complete.examples, "FILE|NAME", "YAML file or name of a shipped example.", "--config", "-c"
    ),
]
SetOption = Annotated[
    list[str] | None,
    offered(complete.settings, "KEY=VALUE", "Override a key, e.g. optim.lr=3e-4.", "--set", "-s"),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object, even on failure.")]
CheckpointOption = Annotated[
    str | None,
    typer.Option(
        "--checkpoint",
        metavar="PATH",
        help="File, run, gpt2, hf:org/name, or folder; default: the newest run's best.",
        autocompletion=complete.runs,
    ),
]
RunArgument = Annotated[
    str | None, offered(complete.runs, "RUN", "Run folder or name; default: the newest.")
]
SplitOption = Annotated[Literal["train", "val"], typer.Option("--split", help="Data split.")]


def flag(name: str, help_: str) -> Any:
    """Return an option without a value: on where it is given."""
    return typer.Option(name, help=help_)


def number(help_: str, least: int = 1) -> Any:
    """Return an option that takes a whole number."""
    return typer.Option(metavar="N", min=least, help=help_)


def output(default: str = "", metavar: str = "FILE") -> Any:
    """Return the option that names the file to write; `default` says which it is without one."""
    help_ = f"Output file; default: {default}." if default else "Output file."
    return typer.Option("--out", "-o", metavar=metavar, help=help_)


ForceRename = Annotated[bool, flag("--force", "Rename an existing OUT to OUT~1.")]


def load(
    config: str | None,
    overrides: list[str] | None,
    flags: dict[str, Any] | None = None,
    base: dict[str, Any] | None = None,
) -> "Config":
    """Return the configuration of a command: file, then `--set`, then its own options."""
    from gptcli.config import load_config

    return load_config(config, overrides or [], flags, base)


def sampling(context: typer.Context) -> dict[str, Any]:
    """Return what a command's options set: the seed, and each key of `generate` by its name."""
    from gptcli.config import GenerateConfig

    given = {"seed": context.params["seed"]}
    for name in GenerateConfig.model_fields:
        value = context.params.get(name)
        if isinstance(value, tuple):  # of an option that can be repeated
            value = list(value) or None
        given[f"generate.{name}"] = value
    return given


def over_run(
    config: str | None, overrides: list[str] | None, flags: dict[str, Any]
) -> "Callable[[dict[str, Any] | None], Config]":
    """Return what loads a command's configuration over the settings of a run that is decoded.

    These lie below `--set` and the options; a configuration file replaces them.
    """

    def settings(run: dict[str, Any] | None) -> "Config":
        return load(config, overrides, flags, run if config is None else None)

    settings(None)  # an error in them comes before torch is loaded
    return settings


def refuse(reasons: dict[str, object]) -> None:
    """Raise ConfigError with the first reason that holds: options that do not go together."""
    for reason, holds in reasons.items():
        if holds:
            raise ConfigError(reason)


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


def skipped_rows(skipped: dict[str, dict[str, Any]], what: str = "row") -> str:
    """Return how many rows were skipped for which reason, and where the first of each is."""
    return ", ".join(
        f"{plural(each['rows'], what)}: {reason} (first: {each['first']})"
        for reason, each in skipped.items()
    )
