"""Put the configuration together: defaults < `extends:` < file < `--set`.

Errors name the place: file:line:column with the line, or the `--set` they come from.
"""

import copy
import difflib
import os
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from gptcli import atomic
from gptcli.config.model import clipped
from gptcli.config.reference import bound, choices, item_of, keys, section_of, sections, suggestion
from gptcli.config.schema import Config
from gptcli.config.windows import MixSource
from gptcli.config.yaml import Document, Key, read_value, read_yaml, scalar
from gptcli.errors import CombinationError, ConfigError

_MAX_EXTENDS = 10
_PYDANTIC_KINDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "model_type": "a section with keys",
    "dict_type": "a section with keys",
    "finite_number": "a finite number",
    "missing": "a value",
}
_RELATIONS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "of at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "of at most"),
}


class _Origins(dict[Key, Document | str]):
    """Where each key's value came from: a file, or the option in words."""

    def error(self, key: Key, message: str) -> ConfigError:
        """Make an error at the place that set `key`, a part of it, or its nearest parent."""
        parts = [known for known in self if len(known) > len(key) and known[: len(key)] == key]
        for place in (key, *parts, *(key[:end] for end in range(len(key) - 1, -1, -1))):
            match self.get(place):
                case Document() as document:
                    return document.error(document.places[place], message)
                case str() as option:
                    return ConfigError(f"{option}: {message}")
        return ConfigError(message)

    def location(self, key: Key) -> str | None:
        """Return the place that set `key`, in a few characters; None if nothing did."""
        for end in range(len(key), 0, -1):
            match self.get(key[:end]):
                case Document() as document:
                    path = Path(document.path)
                    name = path.name if path in example_files() else document.path
                    return f"{name}:{document.places[key[:end]].line}"
                case str() as option:
                    return "-s" if option.startswith("--set ") else option
        return None


def load_config(
    path: str | None,
    overrides: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
    base: Mapping[str, Any] | None = None,
) -> Config:
    """Load a configuration file (or a shipped example's name) and apply the overrides.

    Args:
        path: A YAML file or the name of a shipped example; None for the defaults.
        overrides: `KEY=VALUE` strings of `--set`, later ones win.
        flags: Dotted keys given by separate options, which beat `--set`; None is "not given".
        base: Values below the file, such as a checkpoint's `generate` section.

    Raises:
        ConfigError: With the place, what is wrong, and the nearest valid name.
    """
    return _load(path, overrides, flags, base)[0]


def load_with_sources(
    path: str | None, overrides: Iterable[str] = ()
) -> tuple[Config, dict[str, str]]:
    """Load as `load_config` does; return also where each key that was set comes from."""
    config, origins = _load(path, overrides, None, None)
    places = {key: origins.location(tuple(key.split("."))) for key in keys() if config.is_set(key)}
    return config, {key: place or "file name" for key, place in places.items()}


def _load(
    path: str | None,
    overrides: Iterable[str],
    flags: Mapping[str, Any] | None,
    base: Mapping[str, Any] | None,
) -> tuple[Config, _Origins]:
    origins = _Origins()
    values: dict[str, Any] = copy.deepcopy(dict(base or {}))
    if path is not None:
        for document in reversed(_chain(find_config(path))):
            origins |= dict.fromkeys(document.places, document)
            _merge(values, document.values)
        if values.get("name") is None:
            values["name"] = find_config(path).stem
    for override in overrides:
        key, equals, text = override.partition("=")
        option = f"--set {clipped(override)}"
        if not equals or not key:
            raise ConfigError(f"{option}: expected KEY=VALUE, e.g. optim.lr=3e-4")
        _assign(values, origins, tuple(key.split(".")), read_value(text), option)
    for dotted, value in (flags or {}).items():
        if value is not None:
            _assign(values, origins, tuple(dotted.split(".")), value, f"option for {dotted}")
    return _validate(values, origins), origins


def find_config(path: str) -> Path:
    """Return the file that `path` names: a file, or a shipped example without its `.yaml`.

    Raises:
        ConfigError: There is neither, with the examples there are.
    """
    file = Path(path)
    if atomic.is_file(file) or len(file.parts) > 1 or file.suffix in (".yaml", ".yml"):
        if not os.path.exists(file):  # noqa: PTH110  # Path.exists raises for a name too long
            raise ConfigError(f"{path}: no such configuration file", _hint(file.stem, path))
        return file
    examples = {example.stem: example for example in example_files()}
    if path not in examples:
        message = f"no configuration file or example is named '{clipped(path)}'"
        raise ConfigError(message, _hint(path))
    return examples[path]


def example_files() -> list[Path]:
    """Return the example configurations that ship with the program, sorted."""
    package = Path(__file__).parent.parent
    shipped = package / "examples"  # in the wheel; a checkout has them one level up
    folder = shipped if shipped.is_dir() else package.parent / "examples"
    return sorted(folder.glob("*.yaml"), key=lambda path: path.stem)


def _hint(name: str, file: str | None = None) -> str:
    """Name the example that was meant, or how to start the file and the examples there are."""
    names = [path.stem for path in example_files()]
    if near := difflib.get_close_matches(name, names, 1):
        return f"did you mean '{near[0]}'?"
    start = "examples"
    if file:
        start = f"write it with `gpt config init {shlex.quote(file)}`, or use an example"
    return f"{start}: {', '.join(names)}"


def _chain(path: Path) -> list[Document]:
    """Read a file and the files it extends, nearest first."""
    documents: list[Document] = []
    while True:
        document = read_yaml(path)
        documents.append(document)
        parent = document.values.pop("extends", None)
        if parent is None:
            return documents
        place = document.places[("extends",)]
        if not isinstance(parent, str):
            raise document.error(place, "extends takes the path or name of one configuration")
        if len(documents) == _MAX_EXTENDS:
            raise document.error(place, f"more than {_MAX_EXTENDS} files extend each other")
        beside = path.parent / parent
        try:
            path = beside if atomic.is_file(beside) else find_config(parent)
        except ConfigError as error:
            raise document.error(place, error.message, error.hint) from None


def _merge(values: dict[str, Any], update: Mapping[str, Any]) -> None:
    for key, value in update.items():
        old = values.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            _merge(old, value)
        elif value is not None or not isinstance(old, dict):  # `train:` and no more sets nothing
            values[key] = value


def _assign(values: dict[str, Any], origins: _Origins, key: Key, value: Any, option: str) -> None:
    section = values
    for depth, part in enumerate(key[:-1], 1):
        if section.get(part) is None:
            section[part] = {}
        section = section[part]
        if not isinstance(section, dict):
            raise ConfigError(f"{option}: '{'.'.join(key[:depth])}' is a value, not a section")
    section[key[-1]] = value
    # Forget the file's places below the key: the option is what set them now.
    for known in [known for known in origins if known[: len(key)] == key]:
        del origins[known]
    origins[key] = option


def _validate(values: dict[str, Any], origins: _Origins) -> Config:
    for key in sections():
        if key in values and values[key] is None:  # `train:` with nothing below it
            del values[key]
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        details = error.errors()
        # An unknown name explains more than what its absence causes elsewhere, and a path that is
        # none more than that it is no section either.
        first = {"extra_forbidden": 0, "path": 1}
        details.sort(key=lambda detail: first.get(detail["type"], 2 + _is_other_kind(detail)))
        shown = _explain(details[0], origins)
        others = len({_key(detail) for detail in details}) - 1
        if others:
            shown.hint = f"{others} more error{'s' * (others > 1)} after this one"
        kind = CombinationError if details[0]["type"] == "cross_check" else ConfigError
        raise kind(shown.message, shown.hint) from None


def _is_other_kind(detail: ErrorDetails) -> bool:
    """Tell whether a list was given for a number where a list is allowed too."""
    return detail["type"] == "float_type" and isinstance(detail["input"], list)


def _key(detail: ErrorDetails) -> Key:
    """Return the key an error is about, without pydantic's names of union members."""
    if detail["type"] == "cross_check":
        return tuple(detail["ctx"]["key"].split("."))
    key: list[str] = []
    section: type[BaseModel] | None = Config
    for part in detail["loc"]:
        if section is None:
            break
        key.append(str(part))
        if not isinstance(part, int):
            field = section.model_fields.get(part)
            section = (section_of(field.annotation) or item_of(field.annotation)) if field else None
    return tuple(key)


def _explain(detail: ErrorDetails, origins: _Origins) -> ConfigError:
    key = _key(detail)
    dotted = ".".join(key)
    if detail["type"] == "extra_forbidden":
        in_source = key[:2] == ("data", "mix")
        meant = f"allowed: {', '.join(MixSource.model_fields)}" if in_source else suggestion(key)
        return origins.error(key, f"unknown key '{clipped(dotted)}'; {meant}")
    if detail["type"] == "cross_check":
        others = [tuple(other.split(".")) for other in detail["ctx"]["others"]]
        place = next((known for known in (key, *others) if known in origins), key)
        return origins.error(place, f"{dotted}: {detail['msg']}")
    return origins.error(key, f"{dotted}: expected {_expected(key, detail)}, got {_got(detail)}")


def _got(detail: ErrorDetails) -> str:
    if detail["type"] == "missing":
        return "nothing"
    match detail["input"]:
        case None:
            return "nothing"
        case bool() as value:
            return str(value).lower()
        case float() as value:
            return f"{value:.15g}"
        case str() as text if detail["type"] in ("int_type", "float_type") and _is_number(text):
            return f"{clipped(repr(text))}, which is text; write {clipped(text.replace('_', ''))}"
        case value:
            return clipped(repr(value))


def _is_number(text: str) -> bool:
    """Tell whether `text` is a number but for quotes, or for the sign in 1_000 (YAML 1.1)."""
    return isinstance(scalar(text.replace("_", "")), int | float)


def _expected(key: Key, detail: ErrorDetails) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if kind == "literal_error":
        return (choices(key) or str(context["expected"])).replace("'", "")
    if kind in _RELATIONS:
        short, relation = _RELATIONS[kind]
        return f"a value {relation} {bound(context[short])}"
    return choices(key) or _PYDANTIC_KINDS.get(kind, detail["msg"])
