"""The configuration from defaults, `extends:`, file, `--set` and options; errors name the place."""

from pathlib import Path
from typing import Any

import pytest

from gptcli.config import Config, load_config
from gptcli.config.loader import example_files
from gptcli.errors import ConfigError
from support.folders import Write


def refusal(path: Path | str | None, *overrides: str, **flags: Any) -> ConfigError:
    """Return the error of a configuration that is refused."""
    with pytest.raises(ConfigError) as caught:
        load_config(None if path is None else str(path), overrides, flags)
    assert caught.value.exit_code == 2
    return caught.value


@pytest.mark.parametrize(
    ("text", "first_line"),
    [
        # a typo, at the top and in a section
        ("sead: 1", "1:1: unknown key 'sead'; did you mean 'seed'?"),
        ("trian: {}", "1:1: unknown key 'trian'; did you mean 'train'?"),
        ("model:\n  n_layers: 2",
         "2:3: unknown key 'model.n_layers'; did you mean 'model.n_layer'?"),
        # another program's name for it
        ("learning_rate: 1", "1:1: unknown key 'learning_rate'; did you mean 'optim.lr'?"),
        ("train: {batch_size: 1}",
         "1:9: unknown key 'train.batch_size'; did you mean 'train.micro_batch_size'?"),
        ("model: {n_ctx: 1}", "1:9: unknown key 'model.n_ctx'; did you mean 'model.block_size'?"),
        # the right name in the wrong section
        ("n_layer: 2", "1:1: unknown key 'n_layer'; did you mean 'model.n_layer'?"),
        ("train:\n\n  lr: 1", "3:3: unknown key 'train.lr'; did you mean 'optim.lr'?"),
        ("train: {seed: 1}", "1:9: unknown key 'train.seed'; did you mean 'seed'?"),
    ],
)  # fmt: skip
def test_an_unknown_key_gets_a_suggestion(write: Write, text: str, first_line: str) -> None:
    message = refusal(write(text)).message
    assert message.splitlines()[0] == f"run.yaml:{first_line}"


def test_an_unknown_key_like_nothing_lists_what_is_allowed(write: Write) -> None:
    message = refusal(write("optim: {xyzzy: 1}")).message
    assert "unknown key 'optim.xyzzy'; allowed: name, lr, embed_lr, head_lr" in message


def test_an_error_shows_the_line_and_counts_the_others(write: Write) -> None:
    error = refusal(write("seed: x\nmodel:\n  n_layer: two # oops\n  n_had: 1\n"))
    assert error.message == (
        "run.yaml:4:3: unknown key 'model.n_had'; did you mean 'model.n_head'?\n     4 |   n_had: 1"
    )
    assert error.hint == "2 more errors after this one"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("seed: true", "seed: expected a whole number, got true"),
        ("seed: 1.5", "seed: expected a whole number, got 1.5"),
        ("seed: '1'", "seed: expected a whole number, got '1'"),
        ("seed: -1", "seed: expected a value of at least 0, got -1"),
        (f"seed: {2**63}", "seed: expected a value below 9,223,372,036,854,775,808"),
        (f"seed: {'9' * 5000}", "seed: expected a whole number, got inf"),
        ("name: 5", "name: expected text, got 5"),
        ("model: {n_layer: 0}", "model.n_layer: expected a value above 0, got 0"),
        ("model: {n_layer: two}", "model.n_layer: expected a whole number, got 'two'"),
        ("model: {bias: 1}", "model.bias: expected true or false, got 1"),
        ("model: {dropout: 1}", "model.dropout: expected a value below 1, got 1"),
        ("model: 5", "model: expected a section with keys, got 5"),
        ("model: [1]", "model: expected a section with keys, got [1]"),
        ("optim: {lr: '3e-4'}", "optim.lr: expected a number, got '3e-4'"),
        ("optim: {lr: .nan}", "optim.lr: expected a finite number, got nan"),
        ("optim: {lr: .inf}", "optim.lr: expected a finite number, got inf"),
        ("optim: {lr: null}", "optim.lr: expected a number, got nothing"),
        ("optim: {name: sgd}", "optim.name: expected adamw or muon, got 'sgd'"),
        ("compile: off", "compile: expected true, false or auto, got 'off'"),
        ("generate: {stop: [1]}", "generate.stop: expected text, got 1"),
        ("generate: {stop: x}", "generate.stop: expected a list, got 'x'"),
    ],
)
def test_a_wrong_value_says_what_is_expected(write: Write, text: str, problem: str) -> None:
    message = refusal(write(text)).message
    assert message.startswith("run.yaml:1:")
    assert problem in message.splitlines()[0]
    assert message.splitlines()[1] == f"     1 | {text}"[: len("     1 | ") + 160]


def test_numbers_with_exponents_serve_whole_number_keys(write: Write) -> None:
    path = write("seed: 017\ntrain: {max_steps: 1e3}\ndata: {shard_tokens: 1.0e5}\noptim: {lr: 1}")
    config = load_config(str(path))
    assert (config.seed, config.train.max_steps, config.data.shard_tokens) == (17, 1000, 100_000)
    assert type(config.train.max_steps) is int
    assert config.optim.lr == 1.0
    assert load_config(None, ["optim.lr=3e-4"]).optim.lr == 3e-4


def test_an_option_beats_set_beats_file_beats_parent_beats_default(write: Write) -> None:
    write("seed: 1\ntrain: {max_steps: 1, eval_every: 1, save_every: 1, log_every: 1}", "base.yaml")
    path = write("extends: base.yaml\ntrain: {max_steps: 2, eval_every: 2, save_every: 2}")
    sets = ["train.max_steps=9", "train.max_steps=3", "train.eval_every=3"]
    config = load_config(str(path), sets, {"train.max_steps": 4, "train.log_every": None})
    assert config.train.max_steps == 4  # an option
    assert config.train.eval_every == 3  # --set
    assert config.train.save_every == 2  # the file
    assert config.train.log_every == 1  # its parent; an option that is not given changes nothing
    assert config.train.keep_last == 2  # the default


def test_values_below_the_file_are_not_changed_themselves(write: Write) -> None:
    base = {"generate": {"top_k": 5, "temperature": 0.5}}
    path = write("generate: {top_k: 7}")
    config = load_config(str(path), ["generate.min_p=0.1"], base=base)
    assert (config.generate.top_k, config.generate.temperature) == (7, 0.5)
    assert base == {"generate": {"top_k": 5, "temperature": 0.5}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=fast", "--set optim.lr=fast: optim.lr: expected a number, got 'fast'"),
        ("optim.lr=", "--set optim.lr=: optim.lr: expected a number, got nothing"),
        ("optim.lrr=1", "--set optim.lrr=1: unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
        ("lr=1", "--set lr=1: unknown key 'lr'; did you mean 'optim.lr'?"),
        ("train=5", "--set train=5: train: expected a section with keys, got 5"),
        ("seed.x=1", "--set seed.x=1: seed: expected a whole number, got {'x': 1}"),
        ("a..b=1", "--set a..b=1: unknown key 'a'; allowed: name, run_dir, seed"),
        ("seed", "--set seed: expected KEY=VALUE"),
        ("=5", "--set =5: expected KEY=VALUE"),
        ("extends=quickstart", "--set extends=quickstart: unknown key 'extends'"),
        ("model.n_head=7", "--set model.n_head=7: model.n_embd: 768 is not divisible by n_head"),
        ("seed=*a", "aliases (*) are not allowed"),
        ("name=\x1b", "control character U+001B"),
    ],
)
def test_a_wrong_set_is_named(override: str, message: str) -> None:
    assert message in refusal(None, override).message


def test_an_error_in_an_option_names_it() -> None:
    with pytest.raises(ConfigError, match=r"^option for generate\.top_p: .* at most 1, got 2$"):
        load_config(None, [], {"generate.top_p": 2})


def test_set_takes_lists_and_values_with_equals_signs() -> None:
    config = load_config(None, ["generate.stop=['\\n', x]", "generate.prompt=a=b", "name='5'"])
    assert config.generate.stop == ["\\n", "x"]
    assert config.generate.prompt == "a=b"
    assert config.name == "5"


def test_a_set_replaces_the_place_of_the_files_value(write: Write) -> None:
    path = write("optim: {lr: 1}")
    assert refusal(path, "optim.lr=-1").message.startswith("--set optim.lr=-1: ")
    assert refusal(path, "optim=3").message.startswith("--set optim=3: ")
    whole = "optim={lr: -1}"
    assert refusal(path, whole).message.startswith(f"--set {whole}: optim.lr: ")


def test_a_set_inside_a_value_is_refused(write: Write) -> None:
    assert "'seed' is a value, not a section" in refusal(write("seed: 5"), "seed.x=1").message


def test_an_empty_section_sets_nothing(write: Write) -> None:
    write("train: {max_steps: 3}", "base.yaml")
    path = write("extends: base.yaml\ntrain:\n")
    assert load_config(str(path)).train.max_steps == 3
    assert load_config(str(path), ["train.log_every=5"]).train.log_every == 5
    assert load_config(str(write("train:\n")), ["train.max_steps=5"]).train.max_steps == 5


def test_extends_reads_relative_to_the_file_and_merges_sections(write: Write) -> None:
    write("model: {n_layer: 1, n_head: 1}\ngenerate: {stop: [a, b]}", "configs/base.yaml")
    write("extends: base.yaml\nmodel: {n_head: 2}\nseed: 5", "configs/middle.yaml")
    path = write("extends: middle.yaml\ngenerate: {stop: [c]}", "configs/run.yaml")
    config = load_config(str(path))
    assert (config.model.n_layer, config.model.n_head, config.seed) == (1, 2, 5)
    assert config.generate.stop == ["c"]  # a list is replaced, not added to
    assert config.name == "run"


def test_extends_takes_an_examples_name(write: Write) -> None:
    example = next(file for file in example_files() if file.stem == "quickstart")
    whole = load_config(str(example))
    config = load_config(str(write("extends: quickstart\nseed: 5")))
    assert config.model == whole.model
    assert (config.seed, whole.seed) == (5, 1337)


def test_an_error_in_a_parent_names_the_parent(write: Write) -> None:
    write("seed: 1\nmodel: {n_layer: x}", "base.yaml")
    assert refusal(write("extends: base.yaml\nseed: 2")).message.startswith("base.yaml:2:9: ")


@pytest.mark.parametrize(
    ("text", "first_line"),
    [
        ("seed: 1\nextends: run.yaml", "run.yaml:2:1: more than 10 files extend each other"),
        ("extends: ./none.yaml", "run.yaml:1:1: ./none.yaml: no such configuration file"),
        ("extends: quickstrat",
         "run.yaml:1:1: no configuration file or example is named 'quickstrat'"),
        ("extends: [a, b]", "run.yaml:1:1: extends takes the path or name of one configuration"),
        ("extends: 5", "run.yaml:1:1: extends takes the path or name of one configuration"),
    ],
)  # fmt: skip
def test_a_wrong_extends_is_named(write: Write, text: str, first_line: str) -> None:
    assert refusal(write(text)).message.splitlines()[0] == first_line


def test_two_files_that_extend_each_other_are_refused(write: Write) -> None:
    write("extends: run.yaml", "other.yaml")
    assert "extend each other" in refusal(write("extends: other.yaml")).message


def test_the_name_is_the_files_stem_unless_set(write: Write) -> None:
    write("seed: 1", "my-run.yaml")
    assert load_config("my-run.yaml").name == "my-run"
    assert load_config("my-run.yaml").run_folder == Path("runs/my-run")
    assert load_config("my-run.yaml", ["name=other"]).name == "other"
    write("name: given", "my-run.yaml")
    assert load_config("my-run.yaml").name == "given"
    assert load_config(None).name is None
    assert load_config(None).run_folder == Path("runs/run")
    assert load_config(None, ["run_dir=a/b"]).run_folder == Path("a/b")


def test_a_shipped_example_is_found_by_name(write: Write) -> None:
    config = load_config("quickstart")
    assert config.name == "quickstart"
    assert config.data.source == "stdlib"


def test_a_missing_file_names_the_nearest_example(write: Write, tmp_path: Path) -> None:
    assert refusal("quikstart").hint == "did you mean 'quickstart'?"
    assert refusal("configs/quikstart.yaml").hint == "did you mean 'quickstart'?"
    assert (refusal("zzz").hint or "").startswith("examples: ")
    (tmp_path / "folder.yaml").mkdir()
    assert refusal("folder.yaml").message == (
        "folder.yaml: a configuration is a file, not a folder, pipe or device"
    )


def test_no_file_means_the_defaults() -> None:
    assert load_config(None) == Config()


def test_what_was_set_is_known(write: Write) -> None:
    config = load_config(str(write("data: {text_field: text}")), ["optim.lr=1e-3"])
    assert config.is_set("data.text_field")
    assert config.is_set("optim.lr")
    assert not config.is_set("data.source")
    assert not config.is_set("optim.beta1")
