"""What every key takes and means, told from the schema: for errors, help, editors and the docs.

The schema is the one source; nothing here repeats it. Knows nothing of files or terminals.
"""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import NoneType
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from gptcli.config import words
from gptcli.config.schema import Config
from gptcli.config.yaml import Key
from gptcli.errors import ConfigError

# The same bound, as JSON Schema calls it and as a person would.
_BOUNDS = {
    "gt": ("exclusiveMinimum", "above"),
    "ge": ("minimum", "from"),
    "lt": ("exclusiveMaximum", "below"),
    "le": ("maximum", "up to"),
}
_UNREACHED = 10_000  # bounds beyond this are against typing errors, and left unsaid
_KINDS = {"integer": "a whole number", "number": "a number", "string": "text", "null": "null"}
EXTENDS = "Base configuration (path or example); keys here override it."


@dataclass(frozen=True)
class KeyInfo:
    """One key of the configuration.

    Attributes:
        key: Its dotted name.
        meaning: What it is for, and what a null becomes.
        takes: Its type and bounds, in words.
        default: The value nobody has changed.
        choices: The words it takes, if there are any; booleans as `true` and `false`.
        example: A value somebody might give it.
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
        _, found, words = self.meaning.partition("Null: ")
        return words.rstrip(".") if found else None


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
        raise ConfigError(f"'{name}' could be {' or '.join(ending)}", "give the whole name")
    raise ConfigError(f"unknown key '{name}'", suggestion(tuple(name.split("."))))


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a configuration file, for editors."""
    schema = _in_words(Config.model_json_schema())
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
    """Return 'a, b or c' for a key that takes one of a few words, and what else it takes."""
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


def suggestion(key: Key) -> str:
    """Return the key that was meant: by another program's name, another section, or spelling."""
    *parents, name = key
    if why := words.needless(name):
        return f"leave it out: {why}"
    section = ".".join(parents)
    near = words.key_for(name, section)
    elsewhere = [known for known in keys() if known.rpartition(".")[2] == name]
    if near is None and len(elsewhere) == 1:
        near = elsewhere[0]
    if near is not None:
        note = words.note_for(name)
        return f"did you mean '{near}'?" + (f" ({note})" if note else "")
    prefix = f"{section}." if section else ""
    beside = _names_below(prefix)
    everywhere = {known.rpartition(".")[2]: known for known in (*keys(), *sections())}
    for names in ({inner: prefix + inner for inner in beside}, everywhere):
        if found := difflib.get_close_matches(name, names, 1):
            return f"did you mean '{names[found[0]]}'?"
    return f"allowed: {', '.join(beside or _names_below(''))}"


def _names_below(prefix: str) -> list[str]:
    """Return the names of keys and sections right below `prefix`."""
    found = [known[len(prefix) :].partition(".")[0] for known in keys() if known.startswith(prefix)]
    return list(dict.fromkeys(found))


def _keys_of(section: type[BaseModel], prefix: str) -> Iterator[KeyInfo]:
    schema = section.model_json_schema()
    properties, parts = schema["properties"], schema.get("$defs", {})
    for name, field in section.model_fields.items():
        inner = section_of(field.annotation)
        may_be_null = inner is not None and inner is not field.annotation
        if inner is None or may_be_null:
            yield _info(prefix + name, field, properties[name], parts)
        if inner is not None:
            yield from _keys_of(inner, f"{prefix}{name}.")


def _info(key: str, field: FieldInfo, schema: dict[str, Any], parts: dict[str, Any]) -> KeyInfo:
    branches = schema.get("anyOf", [schema])
    words = tuple(word for branch in branches for word in _words(branch))
    default = field.get_default(call_default_factory=True)
    default = default.model_dump(mode="json") if isinstance(default, BaseModel) else default
    others = [word for word in words if word != _word(default)]
    example = field.examples[0] if field.examples else default
    if not field.examples and others:
        example = {"true": True, "false": False}.get(others[0], others[0])
    alternatives = [part for branch in branches for part in _takes(branch, parts)]
    takes = _or([part for part in alternatives if part != "null"])
    takes += ", or null" * ("null" in alternatives)
    return KeyInfo(key, _one_line(field.description), takes, default, words, example)


def _words(branch: dict[str, Any]) -> list[str]:
    if branch.get("type") == "boolean":
        return ["true", "false"]
    return [str(word) for word in branch.get("enum", [])] + (
        [str(branch["const"])] if "const" in branch else []
    )


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _takes(branch: dict[str, Any], parts: dict[str, Any]) -> list[str]:
    """Say what one alternative of a key's type takes; `parts` are the sections it may name."""
    if words := _words(branch):
        return words
    if "$ref" in branch:
        inner = parts[branch["$ref"].rpartition("/")[2]]
        return ["{" + ", ".join(inner["properties"]) + "}"]
    kind = branch["type"]
    if kind == "array":
        return [f"a list of {_or(_takes(branch['items'], parts))}"]
    bounds = [
        f"{word} {bound(branch[name])}"
        for short, (long, word) in _BOUNDS.items()
        for name in (short, long)
        if name in branch and branch[name] < _UNREACHED
    ]
    return [" ".join([_KINDS[kind], " and ".join(bounds)]).strip()]


def _in_words(schema: Any) -> Any:
    """Give bounds the names that JSON Schema has for them, and texts no line breaks."""
    match schema:
        case dict():
            return {
                _BOUNDS[name][0] if name in _BOUNDS else name: (
                    _one_line(value) if name == "description" and isinstance(value, str)
                    else _in_words(value)
                )
                for name, value in schema.items()
                if not (name == "title" and isinstance(value, str))
            }  # fmt: skip
        case list():
            return [_in_words(item) for item in schema]
    return schema


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


def _or(options: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(options[:-1]), options[-1]]))
