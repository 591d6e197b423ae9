"""`gpt config`: start a configuration, show what is in force and why, explain a key."""

import json
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.commands import complete, options
from gptcli.errors import ConfigError
from gptcli.terminal import console

if TYPE_CHECKING:
    from gptcli.config.reference import KeyInfo

app = typer.Typer(help="Create, inspect and explain configurations.")

From = Annotated[
    str | None, options.offered(complete.examples, "EXAMPLE", "Copy a shipped example.", "--from")
]
KeyArgument = Annotated[
    str | None,
    options.offered(
        complete.settings, "KEY", "A key such as optim.lr, or a section; default: list all."
    ),
]
# What only files that we wrote contain.
_OURS = (b'"title": "gptcli configuration"', b"`gpt config schema --markdown")


@app.command()
def init(
    file: Annotated[
        str | None,
        typer.Argument(metavar="FILE|SOURCE", help="Output file; with --minutes, the text."),
    ] = None,
    from_: From = None,
    minutes: Annotated[
        float | None,
        typer.Option(metavar="M", help="Fit the run to a text, this machine and M minutes."),
    ] = None,
    out: Annotated[str | None, options.output()] = None,
    force: Annotated[bool, options.flag("--force", "Overwrite FILE.")] = False,
    json_: options.JsonOption = False,
) -> None:
    """Write a commented configuration, which --minutes fits to a text."""
    from gptcli.config.loader import find_config, load_config
    from gptcli.config.render import EDITOR_LINE, SCHEMA_FILE, commented_file, explained_file

    source = file if minutes is not None else None
    if minutes is not None and (file is None or from_ is not None or minutes <= 0):
        hint = "name a text and a time: gpt config init book.txt --minutes 10"
        raise ConfigError("--minutes fits a run to a text", hint)
    path = _path(out or (None if source else file) or "run.yaml")
    if path.is_dir():
        raise ConfigError(f"{path} is a folder", "name a file, such as run.yaml")
    if path.exists() and not force:
        raise ConfigError(f"{path} already exists", "choose another name, or add --force")
    name, facts = path.as_posix(), dict[str, Any]()
    if source is not None and minutes is not None:
        from gptcli.api.propose import propose

        with console.bar("measuring for a few seconds"):
            found = propose(source, minutes)
        text = explained_file(name, found.summary, found.settings)
        facts = {"settings": found.settings, "bits_per_byte": found.bits_per_byte}
    elif from_ is None:
        text = commented_file(name)
    else:
        example = find_config(from_)
        load_config(str(example))  # a copy of what is wrong would be wrong
        text = EDITOR_LINE + example.read_text(encoding="utf-8-sig").removeprefix(EDITOR_LINE)
    schema = path.with_name(SCHEMA_FILE)
    _write(schema, _schema_text())
    _write(path, text, force=True)
    if json_:
        console.result_json({"file": name, "schema": schema.as_posix(), **facts})
        return
    console.result(f"{name}: written, with {SCHEMA_FILE}, by which editors complete it")
    from gptcli.data.presets import PRESETS, is_local

    data = load_config(name).data
    match data.source:
        case str(source_) if source_ != "-" and source_ not in PRESETS:
            if not set(source_) & set("*?[:") and not Path(source_).exists():
                console.message(f"put your text in {source_}, or change data.source in {name}")
    words = ["train"] if is_local(data) else ["prepare", "train"]  # train prepares local text
    console.message(f"next: {' && '.join(options.command_for(word, name, None) for word in words)}")


@app.command()
def show(
    config: options.ConfigOption = None,
    set_: options.SetOption = None,
    changed: Annotated[
        bool, options.flag("--changed", "Show only values that differ from the defaults.")
    ] = False,
    json_: options.JsonOption = False,
) -> None:
    """Show every value, its origin, and what a null means."""
    from pydantic import BaseModel

    from gptcli.config.loader import load_with_sources
    from gptcli.config.reference import keys
    from gptcli.config.render import to_yaml

    loaded, origins = load_with_sources(config, set_ or [])
    values: dict[str, dict[str, Any]] = {}
    for key, info in keys().items():
        value, section = loaded.get(key), key.rpartition(".")[0]
        is_there = not isinstance(value, BaseModel)  # a section shows its keys, unless it is null
        is_there &= section not in keys() or loaded.get(section) is not None
        if is_there and not (changed and value == info.default):
            values[key] = {"value": value, "origin": origins.get(key, "default")}
            if value is None and info.null_means is not None:
                values[key]["becomes"] = info.null_means
    if json_:
        console.result_json({"values": values})
        return
    rows = [(key, to_yaml(facts["value"]), facts["origin"], facts.get("becomes", ""))
            for key, facts in values.items()]  # fmt: skip
    console.table(("key", "value", "from", "becomes"), rows)


@app.command()
def schema(
    out: Annotated[str | None, options.output("stdout")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", hidden=True)] = False,
    json_: options.JsonOption = False,
) -> None:
    """Print the JSON Schema for editors."""
    from gptcli.config.render import reference_page

    text = reference_page() if markdown else _schema_text()
    if out is None:
        console.write(text)
        return
    _write(_path(out), text)
    console.result_json({"file": out}) if json_ else console.result(f"{out}: written")


@app.command()
def explain(key: KeyArgument = None, json_: options.JsonOption = False) -> None:
    """Describe a key: its values, meaning and default."""
    from gptcli.config.reference import EXTENDS, find_key, keys, sections
    from gptcli.config.render import to_yaml

    if key is None or key in sections():
        found = [
            info for name, info in keys().items() if name.startswith(f"{key or ''}.") or not key
        ]
        if json_:
            console.result_json({"keys": [asdict(info) for info in found]})
            return
        if key is not None:
            console.result(f"{key}: {sections()[key]}\n")
        rows = [(info.key, to_yaml(info.default), info.meaning) for info in found]
        console.table(("key", "default", "meaning"), rows)
    elif key == "extends":
        text = f"extends\n  {EXTENDS}\n\n  takes    text\n  example  extends: openwebtext"
        console.result_json({"key": key, "meaning": EXTENDS}) if json_ else console.result(text)
    else:
        info = find_key(key.partition("=")[0])
        console.result_json(asdict(info)) if json_ else console.result(_described(info))


def _described(info: "KeyInfo") -> str:
    from gptcli.config.render import to_yaml

    example = to_yaml(info.example)
    setting = f"{info.key}={example}"
    *parents, name = info.key.split(".")
    in_yaml = f"{name}: {example}"
    for parent in reversed(parents):
        in_yaml = f"{parent}: {{{in_yaml}}}"
    lines = [
        info.key,
        textwrap.indent(textwrap.fill(info.meaning, 76), "  "),
        "",
        f"  takes     {info.takes}",
        f"  default   {to_yaml(info.default)}",
        "  example   -s " + (f"'{setting}'" if set(example) & set(" \"'[]{}\\") else setting),
        f"  in YAML   {in_yaml}",
    ]
    return "\n".join(lines)


def _schema_text() -> str:
    from gptcli.config.reference import json_schema

    return json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"


def _path(name: str) -> Path:
    """Return the path that `name` is, if files can have it."""
    from gptcli.config.model import clipped, require_path

    try:
        return Path(require_path(name))
    except ValueError as error:
        raise ConfigError(f"expected {error}, got {clipped(repr(name))}") from error


def _write(path: Path, text: str, *, force: bool = False) -> None:
    """Write one of our texts; a file that is something else is never overwritten."""
    from gptcli import atomic

    if path.exists() and not force:
        old = path.read_bytes()[: 1 << 20] if path.is_file() else b""
        if not any(mark in old for mark in _OURS):
            raise ConfigError(f"{path.as_posix()} already exists and was not written by gptcli")
    with atomic.create_errors(path):
        atomic.write_bytes(path, text.encode())
