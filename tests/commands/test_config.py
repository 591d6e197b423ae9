"""`gpt config`: a file to start from, what is in force, the schema, and one key at a time."""

import json
from pathlib import Path
from typing import Any

import pytest

from gptcli.config import load_config


def test_init_writes_a_file_that_works_and_the_schema_beside_it(gpt: Any) -> None:
    done = gpt("config", "init")
    assert done.code == 0 and done.out.startswith("run.yaml: written")
    assert "put your text in input.txt" in done.err and "next: gpt train -c run.yaml" in done.err
    first = Path("run.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first == "# yaml-language-server: $schema=gptcli.schema.json"
    schema = json.loads(Path("gptcli.schema.json").read_text(encoding="utf-8"))
    assert schema["title"] == "gptcli configuration"
    assert load_config("run.yaml").data.source == "input.txt"


def test_a_run_of_the_file_init_writes(gpt: Any, corpus: Path) -> None:
    corpus.rename("input.txt")
    assert gpt("config", "init").code == 0
    done = gpt("train", "-c", "run.yaml", "-s", "train.max_steps=2", "-s", "model.n_embd=24",
               "-s", "model.n_layer=1", "-s", "model.block_size=16", "--json")  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["run_dir"] == str(Path("runs/run"))


def test_init_overwrites_only_when_told_to(gpt: Any) -> None:
    Path("run.yaml").write_text("seed: 1\n")
    done = gpt("config", "init")
    assert done.code == 2 and "run.yaml already exists" in done.err and "--force" in done.err
    assert Path("run.yaml").read_text() == "seed: 1\n"
    assert not Path("gptcli.schema.json").exists()
    assert gpt("config", "init", "--force").code == 0
    assert "seed: 1\n" not in Path("run.yaml").read_text()


def test_init_never_overwrites_a_schema_that_is_not_ours(gpt: Any) -> None:
    Path("gptcli.schema.json").write_text("{}")
    done = gpt("config", "init")
    assert done.code == 2 and "was not written by gptcli" in done.err
    assert Path("gptcli.schema.json").read_text() == "{}" and not Path("run.yaml").exists()


def test_init_copies_an_example(gpt: Any) -> None:
    Path("conf").mkdir()
    done = gpt("config", "init", "--from", "quickstart", "conf/mine.yaml", "--json")
    assert done.json == {"file": "conf/mine.yaml", "schema": "conf/gptcli.schema.json"}
    assert load_config("conf/mine.yaml") == load_config("quickstart")
    assert "two minutes on any machine" in Path("conf/mine.yaml").read_text()
    done = gpt("config", "init", "--from", "quikstart", "other.yaml")
    assert done.code == 2 and "did you mean 'quickstart'?" in done.err


def test_init_says_what_stands_in_its_way(gpt: Any) -> None:
    assert gpt("config", "init", "nowhere/run.yaml").code == 5
    Path("folder").mkdir()
    assert "is a folder" in gpt("config", "init", "folder").err


def test_show_tells_values_origins_and_what_nulls_mean(gpt: Any) -> None:
    Path("run.yaml").write_text("data: {source: books}\noptim: {lr: 1e-3}\n")
    values = gpt("config", "show", "-c", "run.yaml", "-s", "seed=7", "--json").json["values"]
    assert values["seed"] == {"value": 7, "origin": "-s"}
    assert values["optim.lr"] == {"value": 1e-3, "origin": "run.yaml:2"}
    assert values["optim.min_lr"] == {"value": None, "origin": "default", "becomes": "lr / 10"}
    assert values["data.dir"]["becomes"] == "data/<name of the source>"
    assert values["generate.top_k"] == {"value": None, "origin": "default"}
    lines = gpt("config", "show", "-c", "run.yaml", "--changed").out.splitlines()
    assert [line.split()[0] for line in lines] == ["key", "name", "data.source", "optim.lr"]


def test_show_names_the_line_of_an_error(gpt: Any) -> None:
    Path("run.yaml").write_text("optim: {lrr: 1}\n")
    done = gpt("config", "show", "-c", "run.yaml", "--json")
    assert done.code == 2 and "did you mean 'optim.lr'?" in done.json["error"]


def test_show_tells_adapters_key_by_key(gpt: Any) -> None:
    sets = ["-s", "model.init_from=gpt2", "-s", "model.lora.rank=4"]
    values = gpt("config", "show", *sets, "--json").json["values"]
    assert values["model.lora.rank"] == {"value": 4, "origin": "-s"}
    assert "model.lora" not in values
    assert "model.lora.rank" not in gpt("config", "show", "--json").json["values"]


def test_schema_goes_to_stdout_or_to_a_file_of_ours(gpt: Any) -> None:
    printed = gpt("config", "schema")
    assert printed.code == 0 and "optim" in printed.json["properties"]
    for _ in range(2):
        assert gpt("config", "schema", "-o", "s.json").code == 0
    assert Path("s.json").read_text(encoding="utf-8") == printed.out
    Path("mine.txt").write_text("mine")
    assert gpt("config", "schema", "-o", "mine.txt").code == 2
    assert Path("mine.txt").read_text() == "mine"


def test_explain_says_all_there_is_to_say_of_a_key(gpt: Any) -> None:
    done = gpt("config", "explain", "optim.lr")
    for part in ("optim.lr", "Peak learning rate.", "a number above 0", "0.0006",
                 "-s optim.lr=0.0003", "optim: {lr: 0.0003}"):  # fmt: skip
        assert part in done.out
    assert gpt("config", "explain", "optim.lr=3").out == done.out
    assert gpt("config", "explain", "model.lora.rank").out.count("model: {lora: {rank: 16}}") == 1
    assert gpt("config", "explain", "lr", "--json").json["takes"] == "a number above 0"
    assert "extends: " in gpt("config", "explain", "extends").out


def test_explain_lists_a_section_or_everything(gpt: Any) -> None:
    lines = gpt("config", "explain", "optim").out.splitlines()
    assert lines[0] == "optim: The optimizer and its learning-rate schedule."
    assert all(line.startswith("optim.") for line in lines[3:]) and len(lines) > 10
    everything = gpt("config", "explain", "--json").json["keys"]
    assert {"seed", "optim.lr", "model.lora.rank"} <= {row["key"] for row in everything}


def test_explain_helps_with_a_typo(gpt: Any) -> None:
    done = gpt("config", "explain", "optim.shedule")
    assert done.code == 2 and done.err_lines[-1] == "hint: did you mean 'optim.schedule'?"


@pytest.mark.parametrize("name", ["x" * 300, "x/" * 3000, "a\0b", "\udcff"])
def test_a_name_that_no_file_can_have_is_refused(gpt: Any, name: str) -> None:
    for words in (["init", name], ["schema", "-o", name]):
        done = gpt("config", *words)
        assert done.code == 2 and done.err.startswith("error: expected a path"), done.err
        assert len(done.err) < 300 and list(Path().iterdir()) == []
