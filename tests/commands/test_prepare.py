"""`gpt prepare`: what it returns, the command that comes next, and what is not as asked for."""

import itertools
import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptcli.config import load_config
from gptcli.data.presets import data_dir

TEXT = "".join(f"Line {i} says that {i * 7919} is a number.\n" for i in range(400))
TINY = ["-s", "train.max_steps=1", "-s", "device=cpu", "-s", "model.n_layer=1",
        "-s", "model.n_head=2", "-s", "model.n_embd=8"]  # fmt: skip
CONFIG = """
data: {source: a.txt}
tokenizer: {name: bytes}
model: {n_layer: 1, n_head: 2, n_embd: 8, block_size: 16}
train: {max_steps: 1}
"""


def next_of(done: Any) -> list[str]:
    """Return the words of the next command that was printed, without `gpt`."""
    [line] = [line for line in done.err_lines if line.startswith("next: ")]
    return shlex.split(line.removeprefix("next: gpt "))


@pytest.mark.parametrize(
    ("words", "following"),
    [
        (["a.txt"], ["-s", "data.dir=data/a"]),
        (["a.txt", "--out", "data/x"], ["-s", "data.dir=data/x"]),
        (["a.txt", "--out", "12"], ["-s", 'data.dir="12"']),
        (["a.txt", "--out", "a b/c: #d"], ["-s", 'data.dir="a b/c: #d"']),
        (["a.txt", "-s", "data.seq_len=32", "-s", "data.val_fraction=0.2"],
         ["-s", "data.seq_len=32", "-s", "data.dir=data/a"]),
        (["a.txt", "-s", "tokenizer.name=char"],
         ["-s", "tokenizer.name=char", "-s", "data.dir=data/a"]),
        (["-c", "c.yaml"], ["-c", "c.yaml"]),
        (["-c", "c.yaml", "--out", "data/x"], ["-c", "c.yaml", "-s", "data.dir=data/x"]),
        (["b.txt", "-c", "c.yaml"], ["-c", "c.yaml", "-s", "data.source=b.txt"]),
        (["b.txt", "-c", "c.yaml", "--out", "x"],
         ["-c", "c.yaml", "-s", "data.source=b.txt", "-s", "data.dir=x"]),
        (["-c", "c.yaml", "-s", "data.dir=y", "-s", "seed=3"],
         ["-c", "c.yaml", "-s", "data.dir=y", "-s", "seed=3"]),
    ],
)  # fmt: skip
def test_the_next_command_trains_on_what_was_prepared(
    gpt: Any, words: list[str], following: list[str]
) -> None:
    for name in ("a.txt", "b.txt"):
        Path(name).write_text(TEXT)
    Path("c.yaml").write_text(CONFIG)
    done = gpt("prepare", *words)
    command = next_of(done)
    assert command[: 1 + len(following)] == ["train", *following]
    planned = gpt(*command, *TINY, "--dry-run", "--json")
    assert planned.code == 0, planned.err
    config = command[2] if command[1] == "-c" else None
    sets = [word for option, word in itertools.pairwise(command) if option == "-s"]
    folder = done.out.partition(": 1 document,")[0]
    assert data_dir(load_config(config, sets).data) == Path(folder)
    assert "was prepared from" not in planned.err


def test_a_shipped_example_with_another_folder(gpt: Any) -> None:
    Path("mine.txt").write_text(TEXT)
    done = gpt("prepare", "mine.txt", "-c", "finetune-gpt2", "-s", "data.seq_len=64")
    assert next_of(done) == ["train", "-c", "finetune-gpt2", "-s", "data.seq_len=64",
                             "-s", "data.source=mine.txt"]  # fmt: skip


def test_a_short_text_gets_a_short_context(gpt: Any) -> None:
    Path("a.txt").write_text("a few words of text, not many")
    command = next_of(gpt("prepare", "a.txt", "-s", "tokenizer.name=bytes"))
    assert "model.block_size=2" in command
    assert gpt(*command, *TINY).code == 0
    again = next_of(gpt("prepare", "a.txt", "-s", "tokenizer.name=bytes", "-s", "model.n_layer=1"))
    assert "model.block_size=2" in again


@pytest.mark.parametrize(
    ("text", "words", "remedy"),
    [
        ("ab", [], "use more text"),
        ("some words " * 9, ["-c", "c.yaml"], "or set data.seq_len to 9 or less"),
        ("some words " * 9, ["-s", "model.block_size=99"], "or set data.seq_len to 9 or less"),
    ],
)
def test_a_text_without_a_window_is_noticed(
    gpt: Any, text: str, words: list[str], remedy: str
) -> None:
    Path("a.txt").write_text(text)
    Path("c.yaml").write_text(CONFIG)
    done = gpt("prepare", "a.txt", "-s", "tokenizer.name=bytes", *words)
    assert done.code == 0 and "next:" not in done.err
    assert "warning: the text is too short to train on" in done.err and remedy in done.err


def test_prepared_data_are_said_to_be_there_without_warnings(gpt: Any) -> None:
    Path("a.txt").write_text(TEXT[:3000])
    words = ["prepare", "a.txt", "-s", "tokenizer.name=bpe", "-s", "tokenizer.vocab_size=9999"]
    first, second = gpt(*words), gpt(*words)
    assert "fewer than the 9,999 of tokenizer.vocab_size" in first.err
    assert "9,999" not in second.err
    there = "data/a is prepared already; --force prepares it again"
    assert there not in first.err and there in second.err.replace("\\", "/")
    assert "9,999" in gpt(*words, "--force").err
    assert next_of(first) == next_of(second)


def test_a_share_far_off_is_said(gpt: Any) -> None:
    """Rows by the draw, one of them longer than all others together."""
    lengths = [2] * 119 + [9000]
    rows = (json.dumps({"text": "x" * length}) for length in lengths)
    Path("a.jsonl").write_text("\n".join(rows))
    words = ["prepare", "a.jsonl", "-s", "tokenizer.name=bytes", "-s", "data.val_fraction=0.2"]
    done = gpt(*words)
    assert "of the tokens are for validation, not the 20.00% of data.val_fraction" in done.err
    info = gpt("data", "info", "data/a", "--json").json
    share = info["tokens"]["val"] / (info["tokens"]["val"] + info["tokens"]["train"])
    assert info["val_share"] == pytest.approx(share, abs=1e-5)
    assert f"({share:.2%})" in done.out
    assert f"val_share        {share:.2%} of the tokens" in gpt("data", "info", "data/a").out


def test_info_says_when_the_fraction_was_not_used(gpt: Any) -> None:
    Path("a.txt").write_text(TEXT)
    Path("b.txt").write_text(TEXT[:999])
    assert gpt("prepare", "-s", "data.source={train: a.txt, val: b.txt}").code == 0
    assert gpt("data", "info", "data/a", "--json").json["val_fraction"] is None
    assert "not used: the source has its own validation text" in gpt("data", "info", "data/a").out


def test_prepare_returns_the_object_of_the_contract(gpt: Any, corpus: Path) -> None:
    done = gpt("prepare", str(corpus), "-s", "tokenizer.name=bytes", "--json")
    assert done.code == 0
    found = done.json
    assert list(found) == ["dir", "tokenizer", "vocab_size", "documents", "tokens", "bytes",
                           "shards", "seconds"]  # fmt: skip
    n = corpus.stat().st_size
    assert found["dir"] == str(Path("data/corpus")) and found["tokenizer"] == "bytes"
    assert found["documents"] == 1 and found["vocab_size"] == 257 and found["shards"] == 2
    assert found["tokens"]["train"] + found["tokens"]["val"] == n + 1
    assert found["bytes"]["train"] + found["bytes"]["val"] == n


def test_prepare_names_the_next_command(gpt: Any, corpus: Path) -> None:
    done = gpt("prepare", str(corpus))
    assert "next: gpt train -s data.dir=data/corpus" in done.err
    settings = f"data: {{source: {corpus}, dir: data/other}}\nmodel: {{block_size: 64}}\n"
    Path("run.yaml").write_text(settings)
    assert "next: gpt train -c run.yaml" in gpt("prepare", "-c", "run.yaml").err


def test_prepare_dry_run_writes_nothing(gpt: Any, corpus: Path) -> None:
    done = gpt("prepare", str(corpus), "--dry-run", "--json")
    assert done.code == 0 and done.json["source_bytes"] == corpus.stat().st_size
    assert not Path("data").exists()


def test_a_plan_names_the_tokenizer_that_is_used(gpt: Any, data: Path) -> None:
    words = ("prepare", "corpus.txt", "--out", "data/again", "-s", f"tokenizer.path={data}")
    assert gpt(*words, "--dry-run", "--json").json["tokenizer"] == "bytes"
    done = gpt(*words, "--dry-run")
    assert "to data/again with bytes: about" in done.out + done.err


def test_prepare_lists_the_presets(gpt: Any) -> None:
    done = gpt("prepare", "--list")
    assert done.code == 0 and "stdlib" in done.out and "openwebtext" in done.out


def test_gpt2_tokens_of_the_standard_library(gpt: Any) -> None:
    found = gpt("prepare", "stdlib", "--json").json
    assert found["tokenizer"] == "gpt2" and found["vocab_size"] == 50257
    share = found["bytes"]["val"] / (found["bytes"]["train"] + found["bytes"]["val"])
    assert 0.08 < share < 0.105  # a tenth of the files; their text is a little less
    shard = np.fromfile("data/stdlib/train_000000_000.bin", dtype="<i4", count=3)
    assert shard.tolist() == [20240520, 1, found["tokens"]["train"]]


def test_prepare_proposes_a_network_for_a_small_text(gpt: Any, corpus: Path) -> None:
    [line] = [line for line in gpt("prepare", str(corpus)).err_lines if line.startswith("next: ")]
    assert "data.dir=data/corpus" in line and "model.n_embd=384" in line
    planned = gpt(*shlex.split(line.removeprefix("next: gpt ")), "--dry-run", "--json")
    assert planned.code == 0 and planned.json["parameters"] < 40e6
    chosen = gpt("prepare", str(corpus), "-s", "model.n_layer=3").err
    assert "model.n_layer=3" in chosen and "n_embd" not in chosen


@pytest.fixture
def talks(tmp_path: Path) -> str:
    """A file of 30 conversations."""
    rows = ({"prompt": f"What is {i}?", "completion": "A number."} for i in range(30))
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "chat.jsonl"


def test_conversations_of_gpt2s_tokens_train_gpt2(gpt: Any, talks: str) -> None:
    assert next_of(gpt("prepare", talks)) == [
        "train", "-s", "data.dir=data/chat", "-s", "model.init_from=gpt2",
    ]  # fmt: skip


def test_conversations_in_a_base_models_tokens_train(gpt: Any, talks: str, corpus: Path) -> None:
    base = gpt("prepare", str(corpus), "-s", "tokenizer.name=bpe", "--out", "base", "--json")
    done = gpt("prepare", talks, "-s", "tokenizer.path=base", "--out", "talks")
    assert done.code == 0, done.err
    planned = gpt(*next_of(done), *TINY, "--dry-run", "--json")
    assert planned.code == 0, planned.err
    assert planned.json["vocab_size"] == base.json["vocab_size"] + 2
    changed = gpt("train", "-s", "data.source=chat.jsonl", "-s", "data.dir=talks", *TINY,
                  "-s", "data.bad_rows=skip", "--dry-run")  # fmt: skip
    assert changed.code == 3 and "data.bad_rows = refuse" in changed.err


def test_what_is_left_out_is_shown_before_and_after(gpt: Any) -> None:
    texts = [f"text number {i % 40} of a few" for i in range(60)] + ["short"]
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    Path("a.jsonl").write_text(rows, encoding="utf-8")
    words = ("prepare", "a.jsonl", "--dedup", "-s", "data.filters.min_chars=9")
    planned = gpt(*words, "--dry-run")
    assert [line.strip() for line in planned.out.splitlines()[3:6]] == [
        "of the first 61 documents, 21 would be left out",
        "repeats an earlier document: 20 (32.8%)",
        "a.jsonl: document 41: 'text number 0 of a few'",
    ]
    found = gpt(*words, "--dry-run", "--json").json["left_out"]
    assert found["rows"] == {"repeats an earlier document": 20, "shorter than min_chars": 1}
    done = gpt(*words)
    left_out = (
        "1 document: shorter than min_chars (first: a.jsonl: document 61: 'short'),"
        " 20 documents: repeats an earlier document (first: a.jsonl: document 41)"
    )
    assert f"left out {left_out}" in " ".join(done.err_lines)
    info = gpt("data", "info", "data/a").out
    assert left_out in info and '{"min_chars": 9}' in info and "dedup            exact" in info
    skipped = gpt("data", "info", "data/a", "--json").json["skipped"]
    assert skipped["shorter than min_chars"] == {
        "rows": 1, "first": "a.jsonl: document 61: 'short'"
    }  # fmt: skip
    refused = gpt("prepare", "a.jsonl")
    assert refused.code == 2 and "differs in: dedup, filters" in refused.err
