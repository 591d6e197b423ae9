"""What `data.mix` takes, and what is wrong with what it does not take."""

from typing import Any

import pytest

from gptcli.config import load_config
from gptcli.config.windows import MixSource
from gptcli.errors import ConfigError


def test_a_weight_changes_linearly_between_its_points() -> None:
    falling = MixSource(source="a", weight=[[0.2, 0.9], [0.8, 0.9], [1.0, 0.2]])
    at = [round(falling.weight_at(fraction), 6) for fraction in (0, 0.2, 0.5, 0.8, 0.9, 1, 2)]
    assert at == [0.9, 0.9, 0.9, 0.9, 0.55, 0.2, 0.2]
    assert MixSource(source="a", weight=3).weight_at(0.7) == 3.0


def test_a_mixture_is_read_from_the_command_line_and_written_as_plain_values() -> None:
    config = load_config(None, ["data.mix=[{source: a, weight: 2}, {source: ./b, weight: 1}]"])
    assert config.get("data.mix") == [
        {"source": "a", "weight": 2.0},
        {"source": "./b", "weight": 1.0},
    ]
    assert type(config).model_validate(config.model_dump(mode="json")) == config


REFUSED: list[tuple[str, str]] = [
    ("[{source: a, wieght: 1}]", "unknown key 'data.mix.0.wieght'; allowed: source, weight,"),
    ("[{source: a, weight: lots}]", "data.mix.0.weight: expected a number, got 'lots'"),
    ("[{source: a}]", "data.mix.0.weight: expected a value, got nothing"),
    ("[{source: a, weight: -1}]", "data.mix.0.weight: expected a value of at least 0, got -1"),
    ("[{source: a, weight: [[0, -1]]}]", "expected a value of at least 0, got -1"),
    ("[{source: a, weight: [[0, 1, 2]]}]", "a number or a list of [fraction, weight]"),
    ("[{source: a, weight: [[0.5, 1], [0.2, 2]]}]", "the fractions of a weight rise from 0 to 1"),
    ("[{source: a, weight: [[0, 1], [1.5, 2]]}]", "the fractions of a weight rise from 0 to 1"),
    ("[{source: a, weight: 0}]", "all weights are 0 at 0 of the run"),
    ("[{source: a, weight: [[0, 1], [1, 0]]}]", "all weights are 0 at 1 of the run"),
    ("[{source: a, weight: 1}, {source: a, weight: 2}]", "'a' is in it twice; add up its weights"),
    ("[]", "expected 1 to 64 sources, got 0"),
    ("3", "data.mix: expected a list, got 3"),
]


@pytest.mark.parametrize(("value", "message"), REFUSED)
def test_a_mixture_that_cannot_be_drawn_is_refused(value: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"data.mix={value}"])
    assert message in caught.value.message and len(caught.value.message.splitlines()) == 1


@pytest.mark.parametrize("other", ["data.source=b", "data.dir=b", "data.config=b"])
def test_a_mixture_leaves_no_other_source(other: str) -> None:
    with pytest.raises(ConfigError, match="names all sources, and each has a folder"):
        load_config(None, ["data.mix=[{source: a, weight: 1}]", other])


def test_an_error_names_the_line_in_a_file(tmp_path: Any) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data:\n  mix:\n    - {source: a, weight: 1}\n    - {source: b, weight: x}\n")
    with pytest.raises(ConfigError, match=r"run\.yaml:4:\d+: data\.mix\.1\.weight"):
        load_config(str(path))
