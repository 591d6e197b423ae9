"""`gpt config`: start a configuration, see what is in force and why, look a key up."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gptcli.commands import complete, options
from gptcli.errors import ConfigError
from gptcli.formatting import setting
from gptcli.terminal import console

if TYPE_CHECKING:
    from gptcli.config import Config
    from gptcli.config.reference import KeyInfo

app = typer.Typer(help="Create, inspect and explain configurations.")

From = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="EXAMPLE",
        help="Copy a shipped example.",
        autocompletion=complete.examples,
    ),
]
# What only files that we wrote contain.
_OURS = (b'"title": "gptcli configuration"', b"`gpt config schema --markdown")
KeyArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="KEY",
        help="A key such as optim.lr, or a section; default: list all.",
        autocompletion=complete.keys_and_sections,
    ),
]


@app.command()
def init(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Output file.")] = "run.yaml",
    from_: From = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE.")] = False,
    json_: options.JsonOption = False,
) -> None:
    """Write a commented starter configuration."""
    from gptcli.config.loader import find_config, load_config
    from gptcli.config.template import EDITOR_LINE, SCHEMA_FILE, commented_file

    path = _place(file)
    if path.is_dir():
        raise ConfigError(f"{file} is a folder", "name a file, such as run.yaml")
    if path.exists() and not force:
        raise ConfigError(f"{file} exists already", "choose another name, or add --force")
    if from_ is None:
        text = commented_file(path.as_posix())
    else:
        source = find_config(from_)
        load_config(str(source))  # a copy of what is wrong would be wrong
        text = source.read_text(encoding="utf-8-sig")
        text = text if text.startswith(EDITOR_LINE) else EDITOR_LINE + text
    schema = path.with_name(SCHEMA_FILE)
    _write(schema, _schema_text())
    _write(path, text, force=True)
    if json_:
        console.result_json({"file": path.as_posix(), "schema": schema.as_posix()})
        return
    console.result(f"{path.as_posix()}: written, with {SCHEMA_FILE}, by which editors complete it")
    _say_what_is_next(path.as_posix())


@app.command()
def show(
    config: options.ConfigOption = None,
    set_: options.SetOption = None,
    changed: Annotated[
        bool, typer.Option("--changed", help="Show only values that differ from the defaults.")
    ] = False,
    json_: options.JsonOption = False,
) -> None:
    """Show every value, its origin, and what each null derives to."""
    from gptcli.config.derived import derived
    from gptcli.config.loader import load_with_sources
    from gptcli.config.reference import keys
    from gptcli.config.template import to_yaml

    loaded, origins = load_with_sources(config, set_ or [])
    becomes = derived(loaded, _data_dir(loaded))
    wanted = {
        key: loaded.get(key)
        for key, info in keys().items()
        if not (key.startswith("model.lora.") and loaded.model.lora is None)
        if not (key == "model.lora" and loaded.model.lora is not None)
        if not changed or loaded.get(key) != info.default
    }
    if json_:
        values = {
            key: {
                "value": _plain(value),
                "origin": origins.get(key, "default"),
                **({"becomes": becomes[key]} if key in becomes else {}),
            }
            for key, value in wanted.items()
        }
        console.result_json({"values": values})
        return
    rows = []
    for key, value in wanted.items():
        later = becomes.get(key)
        told = "" if later is None else later if isinstance(later, str) else to_yaml(setting(later))
        rows.append((key, to_yaml(_plain(value)), origins.get(key, "default"), told))
    console.table(("key", "value", "from", "becomes"), rows)


@app.command()
def schema(
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", metavar="FILE", help="Output file; default: stdout."),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", hidden=True)] = False,
    json_: options.JsonOption = False,
) -> None:
    """Print the JSON Schema for editors."""
    from gptcli.config.template import reference_page

    text = reference_page() if markdown else _schema_text()
    if out is None:
        console.write(text)
        return
    _write(_place(out), text)
    if json_:
        console.result_json({"file": out})
    else:
        console.result(f"{out}: written")


@app.command()
def explain(key: KeyArgument = None, json_: options.JsonOption = False) -> None:
    """Describe a key: its values, meaning and default."""
    from gptcli.config.reference import EXTENDS, find_key, keys, sections
    from gptcli.config.template import to_yaml

    known = keys()
    if key is None or key in sections():
        found = [info for name, info in known.items() if key is None or name.startswith(f"{key}.")]
        if json_:
            console.result_json({"keys": [_facts(info) for info in found]})
            return
        if key is not None:
            console.result(f"{key}: {sections()[key]}\n")
        rows = [(info.key, to_yaml(info.default), info.meaning) for info in found]
        console.table(("key", "default", "meaning"), rows)
        return
    if key == "extends":
        text = f"extends\n  {EXTENDS}\n\n  takes    text\n  example  extends: openwebtext"
        console.result_json({"key": key, "meaning": EXTENDS}) if json_ else console.result(text)
        return
    info = find_key(key.partition("=")[0])
    if json_:
        console.result_json(_facts(info))
    else:
        console.result(_described(info))


def _described(info: "KeyInfo") -> str:
    from gptcli.config.template import to_yaml

    example = to_yaml(info.example)
    word = (
        f"'{info.key}={example}'" if set(example) & set(" \"'[]{}\\") else f"{info.key}={example}"
    )
    lines = [
        info.key,
        *(f"  {line}" for line in _wrapped(info.meaning)),
        "",
        f"  takes     {info.takes}",
        f"  default   {to_yaml(info.default)}",
        f"  example   -s {word}",
        f"  in YAML   {_in_yaml(info.key, example)}",
    ]
    used = ", ".join(f"{name} {to_yaml(value)}" for name, value in _in_examples(info.key).items())
    for first, line in enumerate(_wrapped(used, 66)):
        lines.append(("            " if first else "  shipped   ") + line)
    return "\n".join(lines)


def _wrapped(text: str, width: int = 76) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def _in_yaml(key: str, value: str) -> str:
    *parents, name = key.split(".")
    text = f"{name}: {value}"
    for depth, parent in enumerate(reversed(parents)):
        text = f"{parent}: {{{text}}}" if depth or parents else text
    return text


def _in_examples(key: str) -> dict[str, Any]:
    """Return the value of a key in each shipped example that sets it."""
    from gptcli.config.loader import example_files
    from gptcli.config.yaml import read_yaml

    found: dict[str, Any] = {}
    for path in example_files():
        value: Any = read_yaml(path).values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is not None:
            found[path.stem] = value
    return found


def _facts(info: "KeyInfo") -> dict[str, Any]:
    return asdict(info) | {"choices": list(info.choices)}


def _plain(value: Any) -> Any:
    """Return a value without the schema's classes."""
    return value.model_dump(mode="json") if hasattr(value, "model_dump") else value


def _data_dir(config: "Config") -> str | None:
    """Return the folder of the token shards, if the configuration has one."""
    if config.data.dir is None and config.data.source is None:
        return None
    from gptcli.data.sources import data_dir

    return data_dir(config.data).as_posix()


def _say_what_is_next(file: str) -> None:
    from gptcli.config import load_config
    from gptcli.data.sources import is_local

    data = load_config(file).data
    if _is_missing(data.source):
        console.message(f"put your text in {data.source}, or change data.source in {file}")
    words = [] if is_local(data) else ["prepare"]  # train prepares what is on this machine
    commands = [options.command_for(word, file, None) for word in [*words, "train"]]
    console.message(f"next: {' && '.join(commands)}")


def _is_missing(source: Any) -> bool:
    """Tell whether `source` is a file of this machine that is not there yet."""
    from gptcli.data.presets import PRESETS

    is_path = isinstance(source, str) and source not in PRESETS and not set(source) & set("*?[:")
    return is_path and source != "-" and not Path(source).exists()


def _schema_text() -> str:
    from gptcli.config.reference import json_schema

    return json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n"


def _place(name: str) -> Path:
    """Return the path that `name` is, if files can have it."""
    from gptcli.config.section import clipped, require_path

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
            raise ConfigError(f"{path.as_posix()} exists already and is something else")
    with atomic.create_errors(path):
        atomic.write_bytes(path, text.encode())
