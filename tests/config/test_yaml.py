"""YAML as version 1.2 means it, with the place of every key."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gptcli.config.yaml import MAX_BYTES, Place, dump_yaml, read_value, read_yaml
from gptcli.errors import ConfigError
from support.folders import Write


def refusal(path: Path) -> str:
    """Return what `read_yaml` says about a file it refuses."""
    with pytest.raises(ConfigError) as caught:
        read_yaml(path)
    return caught.value.message


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("3E-4", 3e-4),
        ("1e9", 1e9),
        ("1.0e5", 1e5),
        ("6.0e-4", 6e-4),
        ("-1.5", -1.5),
        (".5", 0.5),
        ("5.", 5.0),
    ],
)
def test_numbers_with_a_point_or_exponent_are_floats(text: str, value: float) -> None:
    assert read_value(text) == value
    assert type(read_value(text)) is float


@pytest.mark.parametrize(
    ("text", "value"),
    [("0", 0), ("017", 17), ("-3", -3), ("+3", 3), ("08", 8), ("0x1F", 31), ("0o17", 15)],
)
def test_whole_numbers_are_those_of_yaml_1_2(text: str, value: int) -> None:
    assert read_value(text) == value
    assert type(read_value(text)) is int


@pytest.mark.parametrize(
    "text",
    ["off", "on", "yes", "no", "y", "n", "Off", "1:30", "2024-01-01", "e5", "1e", "1.2.3", "nan",
     "inf", "v1", "NULL1", "a b", "tRUE", "1_000",
     "1_0.5", "0b1", "0X1F", "-0x1"],
)  # fmt: skip
def test_what_yaml_1_1_converts_is_text(text: str) -> None:
    assert read_value(text) == text


@pytest.mark.parametrize("text", ["'5'", '"5"', "'true'", '"null"', "'3e-4'", '"~"'])
def test_quoted_scalars_are_text(text: str) -> None:
    assert read_value(text) == text[1:-1]


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("True", True), ("FALSE", False), ("null", None), ("~", None), ("", None)],
)
def test_booleans_and_null(text: str, value: bool | None) -> None:
    assert read_value(text) is value


def test_not_finite_numbers_are_read_as_such() -> None:
    assert math.isnan(read_value(".nan"))
    assert read_value("-.inf") == -math.inf
    assert read_value("9" * 5000) == math.inf


def test_flow_collections() -> None:
    assert read_value("[1, 2.5, off, 'x']") == [1, 2.5, "off", "x"]
    assert read_value("{a: 1, b: [true]}") == {"a": 1, "b": [True]}


def test_places_count_from_one(write: Write) -> None:
    document = read_yaml(write("# comment\nseed: 1\nmodel:\n  n_layer: 2\n  n_head:   3\n"))
    assert document.values == {"seed": 1, "model": {"n_layer": 2, "n_head": 3}}
    assert document.places["seed",] == Place(2, 1)
    assert document.places["model", "n_layer"] == Place(4, 3)
    assert document.places["model", "n_head"] == Place(5, 3)


def test_crlf_bom_and_empty_files(write: Write) -> None:
    assert read_yaml(write(b"\xef\xbb\xbfseed: 1\r\nname: x\r\n")).values == {
        "seed": 1,
        "name": "x",
    }
    assert read_yaml(write("")).values == {}
    assert read_yaml(write("# nothing\n")).values == {}


def test_a_duplicate_key_names_both_lines(write: Write) -> None:
    message = refusal(write("optim:\n  lr: 1\n  # more\n  lr: 2\n"))
    assert message == "run.yaml:4:3: key 'lr' is already set on line 2\n     4 |   lr: 2"


def test_the_same_key_in_two_sections_is_no_duplicate(write: Write) -> None:
    assert read_yaml(write("a:\n  name: 1\nb:\n  name: 2\n")).values["b"] == {"name": 2}


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ("a: &x 1\nb: *x\n", "2:4", "aliases (*) are not allowed"),
        ("a: &x {<<: *x}\n", "1:12", "aliases (*) are not allowed"),
        ("seed: !!int '5'\n", "1:7", "tags (!) are not allowed"),
        ("seed: !!str 5\n", "1:7", "tags (!) are not allowed"),
        ("seed: ! 5\n", "1:7", "tags (!) are not allowed"),
        ("!key seed: 5\n", "1:1", "tags (!) are not allowed"),
        ("x: !!python/object/apply:os.system [ls]\n", "1:4", "tags (!) are not allowed"),
        ("seed: 1\n---\nseed: 2\n", "2:1", "another document"),
        ("seed: [1,\n", "2:1", "expected the node content"),
        ("name: 'x\n", "2:1", "unexpected end of stream"),
        ("\tseed: 1\n", "1:1", "cannot start any token"),
        ("a: b: c\n", "1:5", "mapping values are not allowed here"),
        ("? [a]\n: b\n", "1:3", "a key must be a plain word"),
        ("- a\n- b\n", "1:1", "expected keys and values"),
        ("just text\n", "1:1", "expected keys and values"),
        ("seed: 1\nname: \x07x\n", "2:7", "control character U+0007"),
        ("name: \x00\n", "1:7", "control character U+0000"),
        ("name: '\uffff'\n", "1:8", "control character U+FFFF"),
    ],
)
def test_what_is_refused_names_its_place(write: Write, text: str, place: str, problem: str) -> None:
    message = refusal(write(text))
    assert message.startswith(f"run.yaml:{place}: ")
    assert problem in message.splitlines()[0]


def test_the_shown_line_is_the_offending_one_and_short(write: Write) -> None:
    message = refusal(write(f"seed: 1\nname: {'x' * 10_000}\nseed: 2\nseed: 3\n"))
    assert message.splitlines()[1] == "     3 | seed: 2"
    long = refusal(write(f"name: [{'x' * 10_000}: *a]\n"))
    assert len(long) < 300


def test_deep_nesting_is_refused(write: Write) -> None:
    message = refusal(write("x: " + "[" * 5000))
    assert message.startswith("run.yaml:1:35: nested too deeply\n") and len(message) < 300
    assert read_value("[" * 32 + "]" * 32)


def test_files_that_are_no_configuration(write: Write, tmp_path: Path) -> None:
    assert refusal(write(b"seed: 1\nname: \xff\n")) == "run.yaml: not UTF-8 at byte 14"
    assert "larger than" in refusal(write(b"#" * (MAX_BYTES + 1)))
    assert refusal(tmp_path / "missing.yaml").endswith("missing.yaml: No such file or directory")


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(),
    # Characters that are special to YAML, JSON or both, and halves of surrogate pairs.
    st.text(st.sampled_from("\x00\x07\t\n\r\x1b\x7f\x85\xa0\u2028\u2029\ufeff\ufffe\uffff\ud800"
                            "\udc00\U0001f600 :#-?[]{},&*!|>'\"%@`\\~0")),
)  # fmt: skip
values = st.one_of(scalars, st.lists(scalars, max_size=4))


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    config=st.dictionaries(
        st.sampled_from(["seed", "name", "a", "b"]),
        st.one_of(values, st.dictionaries(st.sampled_from("xyz"), values, min_size=1)),
        max_size=4,
    )
)
@example(config={"name": "off", "a": "017", "b": {"x": "3e-4", "y": "~", "z": ""}})
@example(config={"a": "x" * 3000, "b": 1e300})
def test_what_is_dumped_reads_back_the_same(write: Write, config: dict[str, Any]) -> None:
    assert read_yaml(write(dump_yaml(config))).values == config


@given(value=st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.text())
@example(value=1e-5)
@example(value="off")
def test_yaml_1_1_reads_the_same(value: Any) -> None:
    config = {"a": value, "b": {"c": [value], "d": {"e": value}}}
    assert yaml.safe_load(dump_yaml(config)) == config
