"""Read one YAML file the way YAML 1.2 means it, and remember the place of each key.

PyYAML follows YAML 1.1, where 3e-4 is a string, `off` is false and 017 is fifteen. Here scalars
resolve by the 1.2 core schema, duplicate keys are errors, and aliases, tags and files over 64 kB
are refused (an alias bomb is two lines long). What is written, YAML 1.1 reads alike.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from gptcli.errors import ConfigError

MAX_BYTES = 1 << 16  # PyYAML takes a second or more for as much
_MOST_LEVELS = 32
_SHOWN_CHARS = 160  # of a line in an error
Key = tuple[str, ...]

_CONSTANTS: dict[str, Any] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
# Python refuses to convert thousands of digits; as a float such a number is infinite, and an error.
_INT = re.compile(r"[-+]?[0-9]{1,1000}\Z")
_OTHER_BASE = re.compile(r"0o[0-7]{1,1000}\Z|0x[0-9a-fA-F]{1,1000}\Z")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z")
_REFUSED: dict[type[yaml.Token], str] = {
    yaml.AliasToken: "YAML aliases (*) are not allowed: write the value out",
    yaml.TagToken: "YAML tags (!) are not allowed",
}
_OPENING = (yaml.BlockMappingStartToken, yaml.BlockSequenceStartToken,
            yaml.FlowMappingStartToken, yaml.FlowSequenceStartToken)  # fmt: skip
_CLOSING = (yaml.BlockEndToken, yaml.FlowMappingEndToken, yaml.FlowSequenceEndToken)
# What YAML does not allow raw, or reads as a line break, and JSON does not escape.
_RAW = re.compile(r"[\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")
_NOT_FINITE = re.compile(r"(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z")


class Place(NamedTuple):
    """A position in a file, counted from one."""

    line: int
    column: int


@dataclass
class Document:
    """The values of a YAML file and the place of every key and value."""

    path: str
    lines: list[str]
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, Place] = field(default_factory=dict)

    def error(self, place: Place, message: str, hint: str | None = None) -> ConfigError:
        """Make an error that shows `place`: file:line:column, message, and the line itself."""
        where = f"{self.path}:{place.line}:{place.column}: {message}"
        if place.line <= len(self.lines):
            where += f"\n  {place.line:>4} | {self.lines[place.line - 1].rstrip()[:_SHOWN_CHARS]}"
        return ConfigError(where, hint)


class _Loader(yaml.SafeLoader):
    """A safe loader that leaves every plain scalar to `scalar`."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012  (PyYAML's own protocol)


def scalar(text: str) -> Any:
    """Turn a plain (unquoted) scalar into null, bool, int, float or str (YAML 1.2 core)."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INT.match(text):
        return int(text)
    if _OTHER_BASE.match(text):
        return int(text, 0)
    if _FLOAT.match(text):
        return float(text)
    if _NOT_FINITE.match(text):
        return float(text.lower().replace(".", ""))
    return text


def read_yaml(path: Path) -> Document:
    """Read a configuration file.

    Raises:
        ConfigError: The file cannot be read or is not plain YAML, with file:line:column.
    """
    try:
        if path.exists() and not path.is_file():  # reading a pipe may never end
            raise ConfigError(f"{path}: a configuration is a file, not a folder, pipe or device")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise ConfigError(f"{path}: larger than {MAX_BYTES} bytes, which no configuration is")
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from error
    document = Document(str(path), text.splitlines())
    node = _compose(document, text)
    if node is not None:
        values = _construct(document, node, ())
        if not isinstance(values, dict):
            raise document.error(_place(node), "expected keys and values, such as `seed: 1`")
        document.values = values
    return document


def read_value(text: str) -> Any:
    """Read the VALUE of `--set KEY=VALUE`: a YAML scalar or a flow list or mapping."""
    document = Document("--set", [text])
    node = _compose(document, text)
    return None if node is None else _construct(document, node, ())


def dump_yaml(values: Mapping[str, Any]) -> str:
    """Write sections of plain values so that `read_yaml` returns them exactly, as YAML 1.1 does."""
    lines: list[str] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            lines += [f"{key}:", *(f"  {k}: {flow(v)}" for k, v in value.items())]
        else:
            lines.append(f"{key}: {flow(value)}")
    return "\n".join(lines) + "\n"


def flow(value: Any, bare: Callable[[str], bool] = lambda text: False) -> str:
    """Write a value on one line: as JSON, which YAML contains, but for numbers with an exponent.

    `bare` tells the texts that need no quotes.
    """
    match value:
        case float():  # to YAML 1.1, 1e-05 is text: it wants a point and a sign
            digits, exponent, power = repr(value).partition("e")
            return digits + ".0" * (bool(exponent) and "." not in digits) + exponent + power
        case str() if bare(value):
            return value
        case Mapping():
            pairs = (f"{flow(key, bare)}: {flow(item, bare)}" for key, item in value.items())
            return "{" + ", ".join(pairs) + "}"
        case list() | tuple():
            return "[" + ", ".join(flow(item, bare) for item in value) + "]"
    text = json.dumps(value, ensure_ascii=False)
    return _RAW.sub(lambda char: f"\\u{ord(char[0]):04x}", text)


def _compose(document: Document, text: str) -> yaml.Node | None:
    try:
        level = 0
        for token in yaml.scan(text, _Loader):
            level += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
            deep = "nested too deeply" if level > _MOST_LEVELS else None
            if refusal := _REFUSED.get(type(token), deep):
                mark = token.start_mark
                raise document.error(Place(mark.line + 1, mark.column + 1), refusal)
        node: yaml.Node | None = yaml.compose(text, _Loader)
        return node
    except yaml.reader.ReaderError as error:
        at = error.position
        place = Place(text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at))
        code = f"{ord(text[at]):04x}"
        message = f'control character U+{code.upper()}: write it as "\\u{code}"'
        raise document.error(place, message) from error
    except yaml.MarkedYAMLError as error:
        assert error.problem_mark and error.problem
        mark = error.problem_mark
        raise document.error(Place(mark.line + 1, mark.column + 1), error.problem) from error


def _place(node: yaml.Node) -> Place:
    return Place(node.start_mark.line + 1, node.start_mark.column + 1)


def _construct(document: Document, node: yaml.Node, at: Key) -> Any:
    """Turn a node into plain values, noting places."""
    document.places.setdefault(at, _place(node))
    match node:
        case yaml.MappingNode():
            return _mapping(document, node, at)
        case yaml.SequenceNode():
            return [_construct(document, item, (*at, str(i))) for i, item in enumerate(node.value)]
        case yaml.ScalarNode():
            return scalar(node.value) if node.style is None else node.value
    raise AssertionError(node)


def _mapping(document: Document, node: yaml.MappingNode, at: Key) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise document.error(_place(key_node), "a key must be a plain word")
        key = str(key_node.value)
        if key in values:
            first = document.places[(*at, key)].line
            raise document.error(_place(key_node), f"key '{key}' is already set on line {first}")
        document.places[(*at, key)] = _place(key_node)
        values[key] = _construct(document, value_node, (*at, key))
    return values
