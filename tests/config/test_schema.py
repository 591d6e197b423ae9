"""What the schema derives, and the checks across its keys."""

import re

import pytest
from pydantic import BaseModel

from gptcli.config import Config, load_config
from gptcli.config.yaml import dump_yaml
from gptcli.errors import ConfigError
from support.folders import Write


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ("model:\n  n_embd: 100\n  n_head: 3", "2:3",
         "model.n_embd: 100 is not divisible by n_head = 3"),
        ("model:\n  n_head: 7", "2:3", "model.n_embd: 768 is not divisible by n_head = 7"),
        ("model: {n_kv_head: 5}", "1:9", "model.n_kv_head: 5 does not divide n_head = 12"),
        ("model: {n_embd: 36, position: rope}", "1:21",
         "model.position: rope needs an even n_embd / n_head, not 3"),
        ("data: {seq_len: 2000}", "1:8",
         "data.seq_len: 2000 is longer than model.block_size = 1024"),
        ("train: {tokens_per_step: 10000}", "1:9",
         "train.tokens_per_step: 10000 is not a multiple of micro_batch_size * seq_len = 8192;"
         " 8192 is"),
        ("train: {tokens_per_step: 1}", "1:9", "; 8192 is"),
        ("train: {tokens_per_step: 15000}", "1:9", "; 16384 is"),
        ("optim: {lr: 1e-4, min_lr: 1e-3}", "1:19", "optim.min_lr: 0.001 is above lr = 0.0001"),
        ("optim: {min_lr: 1}", "1:9", "optim.min_lr: 1 is above lr = 0.0006"),
        ("generate: {stop: [a, '']}", "1:12", "generate.stop: an empty string would stop"),
        ("tokenizer: {vocab_size: 500}", "1:13",
         "tokenizer.vocab_size: only a bpe vocabulary is trained to a size"),
        ("name: a/b", "1:1", "name: 'a/b' cannot be a folder's name"),
        ("name: ..", "1:1", "name: '..' cannot be a folder's name"),
        ("name: ' '", "1:1", "name: ' ' cannot be a folder's name"),
        ("name: ''", "1:1", "name: '' cannot be a folder's name"),
    ],
)  # fmt: skip
def test_keys_that_contradict_each_other(write: Write, text: str, place: str, problem: str) -> None:
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    first_line = caught.value.message.splitlines()[0]
    assert first_line.startswith(f"run.yaml:{place}: ")
    assert problem in first_line


def test_the_tokens_per_step_that_an_error_names_are_valid() -> None:
    sets = ["model.block_size=96", "train.micro_batch_size=5"]
    for wrong in (1, 479, 481, 719, 721, 10_001):
        with pytest.raises(ConfigError) as caught:
            load_config(None, [*sets, f"train.tokens_per_step={wrong}"])
        valid = int(caught.value.message.split("; ")[1].split()[0])
        config = load_config(None, [*sets, f"train.tokens_per_step={valid}"])
        assert config.tokens_per_step == valid and valid % (5 * 96) == 0


def test_nulls_are_derived() -> None:
    config = Config()
    assert config.seq_len == config.stride == 1024
    assert config.tokens_per_step == 8 * 1024
    assert config.min_lr == pytest.approx(6e-5)
    changed = load_config(
        None, ["data.seq_len=64", "train.tokens_per_step=2048", "data.stride=16", "optim.min_lr=0"]
    )
    assert (changed.seq_len, changed.stride, changed.tokens_per_step) == (64, 16, 2048)
    assert changed.tokens_per_step == 4 * changed.rows * changed.seq_len
    assert changed.min_lr == 0


def test_the_defaults_are_gpt2s() -> None:
    model = Config().model
    assert (model.n_layer, model.n_head, model.n_embd, model.block_size) == (12, 12, 768, 1024)
    assert (model.norm, model.position, model.mlp) == ("layernorm", "learned", "gelu")
    assert model.bias and model.tie_embeddings


def test_every_field_is_documented() -> None:
    top = Config()
    sections = {name: value for name, value in top if isinstance(value, BaseModel)}
    assert list(sections) == ["data", "tokenizer", "model", "train", "optim", "generate"]
    missing = [
        f"{type(section).__name__}.{name}"
        for section in (top, *sections.values())
        for name, field in type(section).model_fields.items()
        if not field.description and name not in sections
    ]
    assert missing == []


def test_a_configuration_is_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        Config().seed = 5  # type: ignore[misc]


def test_a_dumped_configuration_loads_as_itself(write: Write) -> None:
    config = load_config(
        None,
        ["name=off", "generate.prompt='017\\n: \u2028 # \"x\"'", "generate.stop=['null', '\u0085']",
         "optim.lr=1e-5", "train.max_steps=1e9", "compile=true"],
    )  # fmt: skip
    path = write(dump_yaml(config.model_dump()))
    assert load_config(str(path)) == config


def test_what_a_tied_head_or_imported_weights_would_ignore_is_refused() -> None:
    for settings, key in (
        (["optim.head_lr=1e-3"], "optim.head_lr"),
        (["model.zero_init_head=true"], "model.zero_init_head"),
        (["model.init_from=gpt2", "model.init_std=0.1"], "model.init_std"),
        (["model.n_value_embd=13"], "model.n_value_embd"),
        (["model.key_offset=true", "model.n_head=384"], "model.key_offset"),
    ):
        with pytest.raises(ConfigError, match=re.escape(key)):
            load_config(None, settings)
