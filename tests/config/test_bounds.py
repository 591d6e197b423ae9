"""Values and names beyond reason: accepted or refused in a short message, never a traceback."""

import os
import sys
from pathlib import Path

import pytest

from gptcli.config import Config, load_config
from gptcli.config.reference import json_schema, keys
from gptcli.config.windows import MixSource
from gptcli.config.yaml import MAX_BYTES
from gptcli.errors import ConfigError
from support.folders import Write

NUMBERS = [key for key, info in keys().items() if "number" in info.takes]
PATHS = ["run_dir={}", "data.dir={}", "data.source={}", "data.source={{train: {}, val: x}}",
         "tokenizer.path={}", "model.init_from={}"]  # fmt: skip
HALF = '"\\ud800"'


def refused(*overrides: str, path: str | None = None) -> ConfigError | None:
    """Return the short error of a configuration; None if it is accepted."""
    try:
        assert isinstance(load_config(path, overrides), Config)
    except ConfigError as error:
        assert len(error.message) < 1000 and len(error.message.splitlines()) <= 2
        return error
    return None


@pytest.mark.parametrize("key", NUMBERS)
def test_every_number_has_bounds(key: str) -> None:
    for value in ("0", "-1", "1e12", "1e13", "1e-300", "0x10"):
        refused(f"{key}={value}")
    for value in ("1e300", "-1e300", "9" * 900, "9" * 5000, ".nan", ".inf", "-.inf"):
        error = refused(f"{key}={value}")
        assert error is not None and key in error.message, value
        assert "expected" in error.message


def test_threads_beyond_what_openmp_survives_are_refused() -> None:
    error = refused("threads=99999999")
    assert error is not None and "threads: expected a value of at most 4,096" in error.message
    assert refused("threads=4096") is None


def test_the_numbers_are_all_that_the_schema_has() -> None:
    def count(schema: object) -> int:
        if isinstance(schema, dict):
            own = schema.get("type") in ("integer", "number")
            return own + sum(map(count, schema.values()))
        return sum(map(count, schema)) if isinstance(schema, list) else 0

    of_sources = count(MixSource.model_json_schema())  # which are below no key of their own
    assert count(json_schema()) == len(NUMBERS) + of_sources > 30
    assert of_sources == 3


@pytest.mark.parametrize("source", ["weight: {}", "weight: [[0, {}]]", "weight: [[{}, 1]]",
                                    "weight: 1, max_epochs: {}"])  # fmt: skip
@pytest.mark.parametrize("value", ["1e300", "9" * 900, ".nan", ".inf", "-.inf", "-1"])
def test_every_number_of_a_mixture_has_bounds(source: str, value: str) -> None:
    error = refused(f"data.mix=[{{source: a, {source.format(value)}}}]")
    assert error is not None and "data.mix" in error.message, value


@pytest.mark.parametrize("setting", ["n_layer=1e6", "n_embd=2000000", "n_embd=1e15", "n_head=1e6"])
def test_a_bound_is_named(setting: str) -> None:
    error = refused(f"model.{setting}")
    assert error is not None and "expected a value of at most " in error.message


@pytest.mark.parametrize("setting", PATHS)
@pytest.mark.parametrize("value", [HALF, '"\\udcff"', '"a\\0b"', "x" * 300, "x/" * 3000],
                         ids=["half", "not UTF-8", "NUL", "long name", "long path"])  # fmt: skip
def test_what_no_file_can_be_called_is_refused(setting: str, value: str) -> None:
    error = refused(setting.format(value))
    assert error is not None and "expected a path" in error.message


@pytest.mark.parametrize("value", [HALF, '"\\0"', "x" * 201, "é" * 101, "x" * 10**5],
                         ids=["half", "NUL", "long", "long in bytes", "huge"])  # fmt: skip
def test_what_no_run_can_be_called_is_refused(value: str) -> None:
    error = refused(f"name={value}")
    assert error is not None and "cannot be a folder's name" in error.message
    assert refused("name=" + "é" * 100) is None


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pipes in folders")
def test_a_pipe_or_device_is_no_configuration(write: Write, tmp_path: Path) -> None:
    os.mkfifo("pipe.yaml")
    for path in ("pipe.yaml", "/dev/zero"):
        error = refused(path=path)
        assert error is not None and "not a folder, pipe or device" in error.message
    for parent in ("pipe.yaml", "/dev/zero", "x" * 300, "x" * 60_000, "x/" * 30_000):
        assert refused(path=str(write(f"extends: {parent}"))) is not None


@pytest.mark.parametrize("path", ["x" * 300, "x" * 300 + ".yaml", "a\0b.yaml", "\udcff.yaml"])
def test_a_configuration_that_cannot_be_there(path: str) -> None:
    assert refused(path=path) is not None


@pytest.mark.parametrize(
    "text",
    ["{" * 60_000, "- " * 30_000, "x: " + "[" * 33, "a: " * 30_000, "name: " + "x" * 60_000,
     "x" * 60_000 + ": 1", "seed: " + "9" * 60_000, "#" * MAX_BYTES + "#",
     "data: {source: " + "{a: " * 31 + "}" * 32],
    ids=["braces", "dashes", "brackets", "colons", "name", "key", "digits", "file", "sections"],
)  # fmt: skip
def test_a_file_that_is_all_one_thing_is_refused_at_once(write: Write, text: str) -> None:
    assert refused(path=str(write(text))) is not None
