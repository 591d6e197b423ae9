"""The commented file, the reference page, where values come from."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from gptcli.config import Config, load_config
from gptcli.config.loader import load_with_sources
from gptcli.config.reference import keys
from gptcli.config.render import (
    STARTER,
    commented_file,
    explicit_settings,
    reference_page,
    to_yaml,
)
from gptcli.config.yaml import read_value
from support.folders import Write

ROOT = Path(__file__).parents[2]


def test_the_commented_file_sets_the_starters_values_only(write: Write) -> None:
    config = load_config(str(write(commented_file("run.yaml"))))
    set_ = {key for key in keys() if config.is_set(key)} - {"name"}
    assert set_ == set(STARTER)
    assert all(config.get(key) == value for key, value in STARTER.items())


def test_each_comment_sign_can_be_taken_away(write: Write) -> None:
    text = commented_file("run.yaml")
    bare = re.sub(r"(?m)^( *)#(?=[a-z_0-9]+: )(?!extends)", r"\1", text)
    config = load_config(str(write(bare)))
    for key, info in keys().items():
        is_in_none = any(key.startswith(f"{section}.") for section in keys())  # which is null
        if key == "name" or is_in_none:
            continue
        assert config.is_set(key), key
        assert config.get(key) == STARTER.get(key, info.default), key


def test_lines_of_the_commented_file_fit() -> None:
    assert max(map(len, commented_file("run.yaml").splitlines())) <= 100


def test_the_reference_page_is_current() -> None:
    page = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert page == reference_page(), "run: gpt config schema --markdown -o docs/config.md"
    assert all(f"`{key}`" in page for key in keys())


@pytest.mark.parametrize(
    "value",
    [None, True, 0, 5, 1e-5, 6e-4, 0.0, 1e9, "auto", "null", "true", "1e5", "a b", "a: b", "#x", "",
     "off", "./a/b.txt", "~", "-", "hf:org/name", ["wte", "h.0-5"], ["\n\n"], {"rank": 16}],
    ids=repr,
)  # fmt: skip
def test_shown_values_are_read_back(value: Any) -> None:
    assert read_value(to_yaml(value)) == yaml.safe_load(to_yaml(value)) == value


def test_defaults_are_what_nobody_changed() -> None:
    assert all(Config().get(key) == info.default for key, info in keys().items()
               if not key.startswith("model.lora."))  # fmt: skip


def test_a_quotient_is_written_as_a_person_would() -> None:
    assert to_yaml(6e-4 / 10) == "6.0e-05" and to_yaml(0.1 + 0.2) == "0.3"


def test_every_value_knows_where_it_comes_from(write: Write) -> None:
    write("seed: 5\nmodel: {n_layer: 3}\n", "base.yaml")
    write("extends: base.yaml\nmodel:\n  n_head: 4\n", "run.yaml")
    config, origins = load_with_sources("run.yaml", ["optim.lr=1e-3", "generate={top_k: 5}"])
    assert origins == {
        "name": "file name",
        "seed": "base.yaml:1",
        "model.n_layer": "base.yaml:2",
        "model.n_head": "run.yaml:3",
        "optim.lr": "-s",
        "generate.top_k": "-s",
    }
    assert config == load_config("run.yaml", ["optim.lr=1e-3", "generate={top_k: 5}"])


def test_values_of_a_shipped_example_name_its_file_without_the_folder() -> None:
    _, origins = load_with_sources("quickstart")
    assert origins["model.n_layer"].startswith("quickstart.yaml:")
    assert load_with_sources(None)[1] == {}


def test_settings_are_those_that_were_given_or_that_no_auto_decides() -> None:
    settings = {
        "name": "a", "run_dir": "runs/a", "seed": 1337, "deterministic": False, "device": "cpu",
        "data.seq_len": 1024, "data.stride": 512, "optim.lr": 1e-3, "optim.min_lr": 1e-4,
        "model.n_layer": 2, "train.tokens_per_step": 8192, "of.another.version": 1,
    }  # fmt: skip
    assert explicit_settings(settings, None) == {
        "data.seq_len": 1024,
        "data.stride": 512,
        "optim.lr": 1e-3,
        "optim.min_lr": 1e-4,
        "model.n_layer": 2,
        "train.tokens_per_step": 8192,
        "of.another.version": 1,
    }
    assert explicit_settings(settings, ["name", "device", "data.stride", "seed"]) == {
        "device": "cpu",
        "data.stride": 512,
        "of.another.version": 1,
    }
    assert explicit_settings({"optim.lr": -1}, None) == {"optim.lr": -1}
