"""Where values come from, and what nulls become."""

from gptcli.config import load_config
from gptcli.config.derived import derived, explicit_settings
from gptcli.config.loader import load_with_sources
from support.folders import Write


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


def test_nulls_become_what_training_makes_of_them() -> None:
    sets = ["model.n_embd=96", "model.n_head=4", "model.mlp=swiglu", "model.bias=false"]
    config = load_config(None, [*sets, "optim.lr=1e-3", "data.seq_len=512"])
    becomes = derived(config, "data/books")
    expected = {
        "name": "books", "run_dir": "runs/books", "data.dir": "data/books", "data.stride": 512,
        "train.tokens_per_step": 8 * 512, "optim.min_lr": 1e-4, "model.n_kv_head": 4,
        "model.head_dim": 24, "model.n_inner": 256, "model.qkv_bias": False,
        "model.vocab_size": 50257, "train.max_steps": "one epoch", "deterministic": False,
    }  # fmt: skip
    assert {key: becomes.get(key) for key in expected} == expected
    assert "data.seq_len" not in becomes and "generate.top_k" not in becomes
    assert becomes["train.eval_tokens"] == "the whole split, at most 1M"


def test_what_comes_with_imported_weights_is_not_guessed() -> None:
    becomes = derived(load_config(None, ["model.init_from=gpt2", "model.dropout=0.1"]))
    assert becomes["model.n_layer"] == "as in gpt2"
    assert "model.dropout" not in becomes
    assert becomes["data.seq_len"] == "model.block_size"


def test_settled_values_that_follow_from_others_were_not_chosen() -> None:
    settings = {
        "name": "a", "run_dir": "runs/a", "seed": 1337, "deterministic": False, "device": "cpu",
        "data.seq_len": 1024, "data.stride": 512, "optim.lr": 1e-3, "optim.min_lr": 1e-4,
        "model.n_layer": 2, "train.tokens_per_step": 8192, "of.another.version": 1,
    }  # fmt: skip
    assert explicit_settings(settings, None) == {
        "data.stride": 512, "optim.lr": 1e-3, "model.n_layer": 2, "of.another.version": 1,
    }  # fmt: skip
    chosen = explicit_settings(settings, ["name", "device"])
    assert chosen["device"] == "cpu" and "name" not in chosen
    assert explicit_settings({"optim.lr": -1}, None) == {"optim.lr": -1}
