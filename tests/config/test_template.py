"""The commented file and the reference page: made from the schema, and true."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from gptcli.config import load_config, load_defaults
from gptcli.config.reference import keys
from gptcli.config.template import STARTER, commented_file, reference_page, to_yaml
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
        if key == "name" or key.startswith("model.lora."):
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
    assert all(load_defaults().get(key) == info.default for key, info in keys().items()
               if not key.startswith("model.lora."))  # fmt: skip
