"""What every key takes and means, read from the schema: for errors, help, editors and the docs."""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import NoneType
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gptcli.config.schema import Config
from gptcli.config.yaml import Key
from gptcli.errors import ConfigError
from gptcli.formatting import listed

_BOUNDS = {
    "exclusiveMinimum": "above", "minimum": "of at least", "exclusiveMaximum": "below",
    "maximum": "up to",
}  # fmt: skip
_UNREACHED = 10_000  # bounds beyond this are against typing errors, and left unsaid
_KINDS = {"integer": "a whole number", "number": "a number", "string": "text", "null": "null"}
EXTENDS = "Base configuration (path or example); keys here override it."


@dataclass(frozen=True)
class KeyInfo:
    """One key of the configuration: its dotted name, what it sets, its type and bounds in words.

    `choices` are the words it takes, booleans as `true` and `false`; `example` is not the default.
    """

    key: str
    meaning: str
    takes: str
    default: Any
    choices: tuple[str, ...]
    example: Any

    @property
    def null_means(self) -> str | None:
        """What a null becomes, in the words of the schema; None where it stays one."""
        return self.meaning.partition("Null: ")[2].rstrip(".") or None


@cache
def keys() -> dict[str, KeyInfo]:
    """Return all keys by their dotted names, in the schema's order."""
    return {info.key: info for info in _keys_of(Config, "")}


def sections() -> dict[str, str]:
    """Return the sections of the file and what they are about."""
    return {
        name: _one_line(section.__doc__)
        for name, field in Config.model_fields.items()
        if (section := section_of(field.annotation)) is not None
    }


def find_key(name: str) -> KeyInfo:
    """Return the key that `name` means: its dotted name, or the last part if one key has it.

    Raises:
        ConfigError: There is none, or there are several, with the likely ones.
    """
    known = keys()
    if name in known:
        return known[name]
    ending = [key for key in known if key.endswith(f".{name}")]
    if len(ending) == 1:
        return known[ending[0]]
    if ending:
        raise ConfigError(f"'{name}' could be {' or '.join(ending)}", "give the full name")
    raise ConfigError(f"unknown key '{name}'", suggestion(tuple(name.split("."))))


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a configuration file, for editors."""
    schema = _tidy(Config.model_json_schema())
    properties = {"extends": {"type": "string", "description": EXTENDS}, **schema["properties"]}
    for name in sections():  # `train:` with nothing below it is allowed
        properties[name] = {"anyOf": [properties[name], {"type": "null"}]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "gptcli configuration",
        "properties": properties,
    }


def choices(key: Key) -> str | None:
    """Return 'a, b or c' for a key that takes one of a few words; None for others."""
    info = keys().get(".".join(key))
    return info.takes.removesuffix(", or null") if info and info.choices else None


def bound(value: float) -> str:
    """Return the end of a range as a person would write it."""
    return f"{int(value):,}" if value == int(value) else f"{value:g}"


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section a field holds, also one that may be null."""
    members = [member for member in get_args(annotation) if member is not NoneType]
    annotation = members[0] if len(members) == 1 else annotation
    is_section = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return annotation if is_section else None


def item_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section that the items of a list are, also of one that may be null."""
    members = [part for part in get_args(annotation) if get_origin(part) is list]
    return section_of(get_args(members[0])[0]) if members else None


def suggestion(key: Key) -> str:
    """Return the key that was meant: by another program's name, another section, or spelling."""
    from gptcli.config import words

    *parents, name = key
    if why := words.NEEDLESS.get(words.plain(name)):
        return f"leave it out: {why}"
    section = ".".join(parents)
    near = words.key_for(name, section)
    elsewhere = [known for known in keys() if known.rpartition(".")[2] == name]
    if near is None and len(elsewhere) == 1:
        near = elsewhere[0]
    if near is not None:
        note = words.note_for(name)
        return f"did you mean '{near}'?" + f" ({note})" * bool(note)
    prefix = f"{section}." if section else ""
    beside = _names_below(prefix)
    everywhere = {known.rpartition(".")[2]: known for known in (*keys(), *sections())}
    for names in ({inner: prefix + inner for inner in beside}, everywhere):
        if found := difflib.get_close_matches(name, names, 1):
            return f"did you mean '{names[found[0]]}'?"
    return f"allowed: {', '.join(beside or _names_below(''))}"


def _names_below(prefix: str) -> list[str]:
    found = [known[len(prefix) :].partition(".")[0] for known in keys() if known.startswith(prefix)]
    return list(dict.fromkeys(found))


def _keys_of(section: type[BaseModel], prefix: str) -> Iterator[KeyInfo]:
    schema = section.model_json_schema()
    properties, parts = schema["properties"], schema.get("$defs", {})
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        if inner is None or inner is not field.annotation:  # a section that may be null is a key
            yield _info(prefix + name, field, properties[name], parts)
        if inner is not None:
            yield from _keys_of(inner, f"{prefix}{name}.")


def _info(key: str, field: FieldInfo, schema: dict[str, Any], parts: dict[str, Any]) -> KeyInfo:
    branches = schema.get("anyOf", [schema])
    words = tuple(word for branch in branches for word in _words(branch))
    default = field.get_default(call_default_factory=True)
    default = default.model_dump(mode="json") if isinstance(default, BaseModel) else default
    spoken = str(default).lower() if isinstance(default, bool) else str(default)
    others = [word for word in words if word != spoken]
    example = field.examples[0] if field.examples else default
    if not field.examples and others:
        example = {"true": True, "false": False}.get(others[0], others[0])
    alternatives = [part for branch in branches for part in _takes(branch, parts)]
    takes = listed([part for part in alternatives if part != "null"], "or")
    takes += ", or null" * ("null" in alternatives)
    return KeyInfo(key, _one_line(field.description), takes, default, words, example)


def _words(branch: dict[str, Any]) -> list[str]:
    if branch.get("type") == "boolean":
        return ["true", "false"]
    return [
        str(word) for word in branch.get("enum", [branch["const"]] if "const" in branch else [])
    ]


def _takes(branch: dict[str, Any], parts: dict[str, Any]) -> list[str]:
    """Say what one alternative of a key's type takes; `parts` are the sections it may name."""
    if words := _words(branch):
        return words
    if "$ref" in branch:
        return ["{" + ", ".join(parts[branch["$ref"].rpartition("/")[2]]["properties"]) + "}"]
    if branch["type"] == "array":
        items = listed(_takes(branch["items"], parts), "or")
        return [f"a list of {'strings' if items == 'text' else items}"]
    bounds = [f"{word} {bound(branch[name])}" for name, word in _BOUNDS.items()
              if branch.get(name, _UNREACHED) < _UNREACHED]  # fmt: skip
    return [" ".join([_KINDS[branch["type"]], " and ".join(bounds)]).strip()]


def _tidy(schema: Any) -> Any:
    """Drop pydantic's titles from a JSON Schema, and line breaks from its descriptions."""
    match schema:
        case dict():
            return {name: _one_line(value) if name == "description" else _tidy(value)
                    for name, value in schema.items() if name != "title"}  # fmt: skip
        case list():
            return [_tidy(item) for item in schema]
    return schema


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())
