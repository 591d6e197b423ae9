"""What is told about the keys: it comes from the schema, and what it says is true."""

from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from gptcli.config import load_config
from gptcli.config.loader import example_files
from gptcli.config.model import Section
from gptcli.config.reference import choices, find_key, json_schema, keys, sections
from gptcli.config.render import to_yaml
from gptcli.config.yaml import dump_yaml, read_value, read_yaml
from gptcli.errors import ConfigError

# What else must be set for an example to be allowed.
NEEDED = {
    "tokenizer.vocab_size": ["tokenizer.name=bpe"],
    "model.lora": ["model.init_from=gpt2"],
    "model.lora.rank": ["model.init_from=gpt2"],
    "model.lora.alpha": ["model.init_from=gpt2"],
    "model.lora.targets": ["model.init_from=gpt2"],
    "model.rope_theta": ["model.position=rope"],
    "model.zero_init_head": ["model.tie_embeddings=false"],
    "optim.head_lr": ["model.tie_embeddings=false"],
    "optim.momentum": ["optim.name=muon"],
    "train.micro_batch_size": ["train.tokens_per_step=65536"],
}


@pytest.fixture(scope="module")
def check() -> Any:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.mark.parametrize("key", keys())
def test_every_example_is_another_value_that_is_allowed(key: str, check: Any) -> None:
    info = keys()[key]
    assert info.example != info.default, f"{key}: give its field examples=[...]"
    config = load_config(None, [*NEEDED.get(key, []), f"{key}={to_yaml(info.example)}"])
    found = config.get(key)
    expected = type(found)(**info.example) if isinstance(found, Section) else info.example
    assert found == expected
    nested: Any = info.example
    for part in reversed(key.split(".")):
        nested = {part: nested}
    check.validate(nested)


def test_every_key_and_section_has_a_meaning() -> None:
    assert [key for key, info in keys().items() if not info.meaning or "\n" in info.meaning] == []
    assert all(sections().values())


@pytest.mark.parametrize(
    ("key", "takes"),
    [
        ("optim.lr", "a number above 0"),
        ("seed", "a whole number of at least 0"),
        ("model.dropout", "a number of at least 0 and below 1"),
        ("generate.top_p", "a number above 0 and up to 1, or null"),
        ("compile", "true, false or auto"),
        ("train.micro_batch_size", "a whole number above 0 or auto"),
        ("train.freeze", "a list of strings"),
        ("data.source", "text or {train, val}, or null"),
        ("model.qkv_bias", "true or false, or null"),
    ],
)
def test_types_are_told_in_words(key: str, takes: str) -> None:
    assert find_key(key).takes == takes


def test_keys_are_found_by_their_last_part_where_that_is_one() -> None:
    assert find_key("lr").key == "optim.lr"
    assert find_key("name").key == "name"
    with pytest.raises(ConfigError, match=r"'config' could be|unknown key") as caught:
        find_key("n_layr")
    assert caught.value.hint == "did you mean 'model.n_layer'?"
    for wrong, right in {"batch_size": "train.micro_batch_size", "optim.lrr": "optim.lr"}.items():
        with pytest.raises(ConfigError) as caught:
            find_key(wrong)
        assert caught.value.hint == f"did you mean '{right}'?"
    with pytest.raises(ConfigError, match=r"'vocab_size' could be tokenizer\.vocab_size or model"):
        find_key("vocab_size")


def test_a_section_that_does_not_exist_is_an_error_like_any_other() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'optimizer\.x\.y'"):
        find_key("optimizer.x.y")


def test_choices_are_for_errors() -> None:
    assert choices(("optim", "name")) == "adamw or muon"
    assert choices(("train", "micro_batch_size")) == "a whole number above 0 or auto"
    assert choices(("optim", "lr")) is None
    assert choices(("no", "such")) is None


@pytest.mark.parametrize("path", example_files(), ids=lambda path: path.stem)
def test_editors_find_no_fault_in_the_examples(path: Any, check: Any) -> None:
    check.validate(read_yaml(path).values)


@pytest.mark.parametrize(
    "text",
    ["{optim: {lrr: 1}}", "{optim: {lr: 0}}", "{optim: {lr: fast}}", "{seed: -1}", "{modle: {}}",
     "{model: {norm: batch}}", "{model: {dropout: 1}}", "{train: {max_steps: 0}}"],
)  # fmt: skip
def test_editors_find_what_the_loader_finds(text: str, check: Any) -> None:
    with pytest.raises(jsonschema.ValidationError):
        check.validate(read_value(text))


def test_a_runs_configuration_is_valid_to_a_reader_of_yaml_1_1(check: Any) -> None:
    config = load_config(None, ["optim.lr=1e-5", "train.max_steps=1e9", "name=off", "seed=0x10"])
    values = yaml.safe_load(dump_yaml(config.model_dump()))
    check.validate(values)
    assert values["model"]["norm_eps"] == values["optim"]["lr"] == 1e-5 and values["name"] == "off"


@pytest.mark.parametrize("text", ["seed: 1_000", "optim: {lr: 1_000.5}"])
def test_a_sign_in_a_number_is_refused_by_editors_and_by_us(text: str, check: Any) -> None:
    values = read_value("{" + text + "}")
    with pytest.raises(jsonschema.ValidationError):
        check.validate(values)
    Path("run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"got '1_000.*', which is text; write 1000"):
        load_config("run.yaml")


@pytest.mark.parametrize(
    "text",
    ["{optim: null}", "{extends: openwebtext}", "{train: {max_steps: 1e9}}", "{compile: auto}"],
)
def test_editors_allow_what_the_loader_allows(text: str, check: Any) -> None:
    check.validate(read_value(text))
