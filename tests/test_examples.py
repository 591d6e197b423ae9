"""Every shipped example: valid, buildable at full size, and what its head says, done in small."""

import io
import json
import os
import re
import shlex
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import cached_assets_path
from transformers import GPT2Config, GPT2LMHeadModel

from gptcli.checkpoint import load_checkpoint
from gptcli.commands import complete, examples
from gptcli.config import Config, load_config
from gptcli.config.loader import example_files
from gptcli.config.reference import keys
from gptcli.config.render import EDITOR_LINE, SCHEMA_FILE, about_example
from gptcli.config.schema import SplitSource
from gptcli.data.presets import PRESETS
from gptcli.model import GPT
from support.commands import Gpt
from support.hub import Hub

EXAMPLES = example_files()
NAMES = [path.stem for path in EXAMPLES]
each = pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)

# What users of the programs that these take the place of look for.
PROMISED: dict[str, dict[str, Any]] = {
    "openwebtext": {"model.n_layer": 12, "model.n_embd": 768, "model.block_size": 1024},
    "openwebtext-char": {"tokenizer.name": "char", "train.eval_every": 100},
    "tinystories-small": {"model.block_size": 128, "model.n_embd": 384},
    "tinystories-124m": {"model.block_size": 256, "model.n_embd": 768},
    "tinystories-large": {"model.block_size": 512, "model.n_embd": 1024},
    "input-txt": {
        "train.micro_batch_size": 4, "model.block_size": 32, "train.max_epochs": 25,
        "optim.schedule": "cosine", "data.val_fraction": 0,
    },
    "wikipedia": {"optim.warmup_steps": 1000, "optim.grad_clip": 1.0},
    "gpt2-8head": {"tokenizer.vocab_size": 50176, "model.vocab_size": 50176, "model.n_head": 8},
    "finetune-gpt2": {"model.init_from": "gpt2"},
    "modern-124m": {"model.position": "rope", "optim.name": "muon"},
    "shakespeare-char": {"tokenizer.name": "char", "model.n_embd": 384, "train.max_steps": 5000},
    "overfit": {"data.val_fraction": 0},
    "quickstart": {"tokenizer.name": "bpe", "train.max_minutes": 2},
    "chat-stdlib": {"model.init_from": "quickstart", "tokenizer.path": "data/quickstart"},
    "mix-stdlib": {"model.init_from": "quickstart", "tokenizer.path": "data/quickstart"},
    "stdlib-10min": {"tokenizer.name": "bpe", "train.max_minutes": 10},
    "small-text": {"tokenizer.name": "bpe", "data.source": "input.txt"},
    "benchmark-char": {"tokenizer.name": "char", "model.block_size": 64},
}  # fmt: skip
for _size in ("small", "124m", "large"):
    PROMISED[f"tinystories-{_size}"] |= {
        "optim.lr": 5e-4, "model.qkv_bias": False, "data.val_fraction": 0.1, "train.max_epochs": 1,
        "data.stride": PROMISED[f"tinystories-{_size}"]["model.block_size"],
    }  # fmt: skip
CONTEXT = 32


def test_there_is_an_example_for_everyone() -> None:
    assert set(NAMES) == set(PROMISED)
    for name, promised in PROMISED.items():
        config = load_config(name)
        assert {key: config.get(key) for key in promised} == promised
        assert config.name == name
    source = load_config("openwebtext-char").data.source
    assert source == SplitSource(train="train_split.txt", val="val_split.txt")


def vocab_size_of(config: Config) -> int:
    """Return the most tokens that the data's vocabulary may have; characters are not known."""
    return {"gpt2": 50257, "bytes": 257, "bpe": config.tokenizer.vocab_size or 4096}.get(
        config.tokenizer.name, 257
    )


@each
def test_full_size_networks_can_be_built(path: Path) -> None:
    config = load_config(str(path))
    vocab_size = config.model.vocab_size or vocab_size_of(config)
    with torch.device("meta"):
        model = GPT(config.model.model_copy(update={"vocab_size": vocab_size}))
        tokens = torch.zeros(1, config.seq_len, dtype=torch.int64)
        logits = model(tokens).logits
    assert logits.shape == (1, config.seq_len, vocab_size)
    assert config.data.source or config.data.mix, "an example says what to prepare"


@each
def test_no_key_is_without_effect(path: Path) -> None:
    config = load_config(str(path))
    train, optim = config.train, config.optim
    if optim.schedule == "constant":
        assert not config.is_set("optim.min_lr"), "a constant rate has no end"
    if train.max_steps is not None:
        assert optim.warmup_steps < train.max_steps
        every = {"eval_every": train.eval_every, "sample_every": train.sample_every or 1}
        every |= {"save_every": train.save_every} if config.is_set("train.save_every") else {}
        assert all(steps <= train.max_steps for steps in every.values()), every
    if config.data.val_fraction == 0:
        assert not config.is_set("train.eval_tokens"), "there is nothing to evaluate on"
    if isinstance(config.data.source, SplitSource):
        assert config.data.val_fraction is None
    if config.generate.temperature == 0:
        assert config.generate.top_k is None and config.generate.top_p is None
    if config.model.vocab_size is not None:
        assert config.model.vocab_size >= vocab_size_of(config)
        assert config.model.vocab_size % 64 == 0
    assert config.stride <= config.seq_len, "text between the rows would be lost"
    if config.model.init_from == "gpt2":
        assert config.model.block_size <= 1024
        assert config.model.model_fields_set <= {"init_from", "block_size", "dropout"}
    is_own = config.tokenizer.name != "gpt2" or config.data.val_fraction is not None
    if is_own and config.data.mix is None:
        assert config.data.dir not in (None, f"data/{config.data.source}"), (
            "`gpt prepare PRESET` makes other data than this example needs"
        )


def head(path: Path) -> str:
    """Return an example's comment, without what makes it one."""
    text = path.read_text(encoding="utf-8").removeprefix(EDITOR_LINE)
    comment = text[: re.search(r"^(?!#)", text, re.MULTILINE).start()]  # type: ignore[union-attr]
    return re.sub(r"^# ?", "", comment, flags=re.MULTILINE)


def commands(path: Path) -> list[list[str]]:
    """Return the command lines that an example's head tells to type."""
    return [shlex.split(line) for line in head(path).splitlines() if line.startswith("  gpt ")]


@each
def test_heads_say_what_and_why_and_what_it_costs(path: Path) -> None:
    assert path.read_text(encoding="utf-8").startswith(EDITOR_LINE)
    lines = head(path).splitlines()
    assert 20 < len(about_example(path)) <= 98 and lines[0] == about_example(path)
    for label in ("Replaces: ", "Expected: ", "Cost: "):
        assert sum(line.startswith(label) for line in lines) == 1, label
    named = {word for words in commands(path) for word, c in zip(words[1:], words, strict=False)
             if c == "-c"}  # fmt: skip
    assert named <= {path.stem}, "the commands are this example's"
    assert any(words[1] == "train" for words in commands(path))
    for words in commands(path):
        if words[1] == "prepare" and words[2] in PRESETS and "-c" not in words:
            assert examples.trains_on(load_config(None, [f"data.source={words[2]}"])) == path.stem
    # What is said in passing must be possible too.
    passing = " ".join(line for line in lines if not line.startswith("  gpt "))
    for group in re.findall(r"(?:-s [a-z_]+(?:\.[a-z_]+)?=\S+ ?)+", passing):
        load_config(str(path), [word.rstrip(",.;:") for word in group.split() if word != "-s"])


def test_editors_find_the_schema_beside_the_examples(gpt: Any) -> None:
    shipped = EXAMPLES[0].with_name(SCHEMA_FILE).read_text(encoding="utf-8")
    again = "write it anew: gpt config schema -o examples/gptcli.schema.json"
    assert gpt("config", "schema").out == shipped, again


def test_the_page_of_examples_has_a_row_for_each() -> None:
    page = EXAMPLES[0].with_name("README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w-]+)` \|(.*)\|$", page, re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(NAMES)
    assert all(row.count("|") == rows[0][1].count("|") for _, row in rows)
    assert set(re.findall(r"-c ([\w-]+)", page)) - {"NAME"} <= set(NAMES)


@each
def test_examples_can_be_copied_and_changed(path: Path, gpt: Any) -> None:
    done = gpt("config", "init", "mine.yaml", "--from", path.stem)
    assert done.code == 0, done.err
    assert Path("mine.yaml").read_text(encoding="utf-8").count("yaml-language-server") == 1
    mine, theirs = load_config("mine.yaml"), load_config(path.stem)
    assert mine.model_copy(update={"name": path.stem}) == theirs


def test_lists_and_completions_know_the_examples_and_no_recipe(gpt: Any) -> None:
    assert [name for name, _ in complete.examples("")] == NAMES
    assert [name for name, _ in complete.examples("tiny")] == [
        "tinystories-124m", "tinystories-large", "tinystories-small"
    ]  # fmt: skip
    listed = gpt("prepare", "--list").out
    assert all(f"\n{name} " in listed for name in NAMES)
    presets = gpt("prepare", "--list", "--json").json
    assert presets["wikipedia"]["examples"] == ["wikipedia"]
    assert presets["stdlib"]["examples"] == ["benchmark-char", "quickstart", "stdlib-10min"]
    assert "kubernetes" not in NAMES and "kubernetes" not in listed


# In small, end to end.

STORY = (
    "Once upon a time a cat sat on a mat. ROMEO: The city of big red barns! "
    "def __init__(self): class TextWrapper. Hello! Can you see me? "
)


def parquet(rows: list[str]) -> bytes:
    """Return a Parquet file with a text column."""
    out = io.BytesIO()
    pq.write_table(pa.table({"text": rows}), out)
    return out.getvalue()


def dataset(config: str, train: str, val: str | None = None) -> dict[str, bytes]:
    """Return a data set of the Hub with one configuration."""
    splits = {"train": train} | ({"validation": val} if val else {})
    readme = f"---\nconfigs:\n- config_name: {config}\n  data_files:\n" + "".join(
        f"  - split: {split}\n    path: {path}\n" for split, path in splits.items()
    )
    rows = [f"{STORY} It is story {number}." for number in range(200)]
    files = {path.replace("*", "00000.parquet"): parquet(rows) for path in splits.values()}
    return {"README.md": f"{readme}---\n".encode(), **files}


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The data sets and the network that examples name, all small; and a cache for them."""
    folder = tmp_path_factory.mktemp("hub")
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=8)).save_pretrained(folder / "gpt2")
    repositories = {
        "Skylion007/openwebtext": dataset("plain_text", "plain_text/train-*"),
        "roneneldan/TinyStories": dataset("default", "data/train-*", "data/validation-*"),
        "wikimedia/wikipedia": dataset("20231101.en", "20231101.en/train-*"),
        "HuggingFaceFW/fineweb": dataset("sample-10BT", "sample/10BT/*"),
        "openai-community/gpt2": {p.name: p.read_bytes() for p in (folder / "gpt2").iterdir()},
    }
    preset = PRESETS["shakespeare"]
    cached = cached_assets_path("gptcli", namespace="web", assets_dir=folder / "hf" / "assets")
    play = (STORY + "\n") * (preset.download_bytes // len(STORY))
    (cached / quote(preset.where, safe="")).write_text(play[: preset.download_bytes])
    with Hub(repositories) as running:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
        env |= {"HF_HOME": str(folder / "hf"), "HF_ENDPOINT": running.url, "GPTCLI_FAST": "0"}
        running.env = env | {"HF_HUB_DISABLE_XET": "1"}
        yield running


def smaller(config: Config) -> list[str]:
    """Return the overrides that make an example small: sizes and steps, nothing else."""
    is_asked = "quickstart" in (config.name, config.model.init_from) and config.data.mix is None
    context = 8 * CONTEXT if is_asked else CONTEXT  # questions are longer
    found = [
        f"model.block_size={context}", "train.max_steps=2", "train.micro_batch_size=2",
        "train.eval_every=1", "train.log_every=1", "generate.max_new_tokens=4", "device=cpu",
        "compile=false",
    ]  # fmt: skip
    if config.model.init_from == "scratch":
        found += ["model.n_layer=2", f"model.n_embd={4 * config.model.n_head}"]
    if config.data.stride:
        found.append(f"data.stride={CONTEXT * config.data.stride // config.seq_len}")
    if config.train.tokens_per_step:
        found.append(f"train.tokens_per_step={4 * CONTEXT}")
    if config.optim.warmup_steps:
        found.append("optim.warmup_steps=1")
    found += [f"train.{key}=64" for key in ("eval_tokens",) if getattr(config.train, key)]
    found += [f"train.{key}=1" for key in ("sample_every",) if getattr(config.train, key)]
    return found


@pytest.fixture
def type_in(gpt: Gpt, hub: Any, fork_server: Gpt) -> Callable[[Config, list[str]], str]:
    """Run a command line of a head in small, where the Hub is ours; return its stdout."""

    def run(config: Config, words: list[str]) -> str:
        name, *words = words[1:]
        tuned = any(word.startswith("model.init_from=") for word in words)
        if name == "train":
            more = (
                ["train.max_steps=2", "device=cpu", "compile=false"] if tuned else smaller(config)
            )
            words += [part for word in more for part in ("-s", word)] + ["--json"]
        if name == "generate":
            words += ["--max-new-tokens", "4"]
        if config.data.source == "stdlib" and "-c" in words:  # twelve megabytes
            words = [word for word in words if word != "stdlib"]
            words += ["-s", "data.source=stdlib:textwrap"]
        words.insert(0, name)
        asks = config.data.source in PRESETS and PRESETS[str(config.data.source)].kind != "library"
        if (name == "prepare" and asks) or (name == "train" and config.model.init_from == "gpt2"):
            done = fork_server(*words, env=hub.env)
            assert done.code == 0, done.err
            return done.out
        result = gpt(*words)
        assert result.code == 0, result.err
        return str(result.out)

    return run


def write_texts(corpus: Path) -> None:
    """Write the text files that heads speak of."""
    text = corpus.read_text() + STORY + "".join(sorted(string.printable))
    for name in ("input.txt", "train_split.txt", "val_split.txt", "mine.txt"):
        Path(name).write_text(text, encoding="utf-8", newline="\n")
    Path("vocab.txt").write_text("".join(sorted(string.printable)), encoding="utf-8", newline="\n")


@each
def test_an_example_does_what_its_head_says(path: Path, corpus: Path, type_in: Any) -> None:
    config = load_config(str(path))
    write_texts(corpus)
    if config.model.init_from in NAMES:  # a run that comes before
        base = path.with_name(f"{config.model.init_from}.yaml")
        for words in commands(base)[:2]:
            type_in(load_config(str(base)), words)
    for words in commands(path):
        out = type_in(config, words)
        if words[1] == "train":
            assert json.loads(out)["step"] == 2
    if config.data.val_fraction != 0:
        type_in(config, ["gpt", "eval", path.stem])
    type_in(config, ["gpt", "generate", "--checkpoint", path.stem])
    require_used(config, Path("runs") / path.stem)


def require_used(config: Config, run: Path) -> None:
    """Compare what a run used with what its example set, but for what was made smaller."""
    changed = {word.partition("=")[0] for word in smaller(config)}
    settled = load_config(str(run / "config.yaml"))
    if config.data.source == "stdlib":
        changed.add("data.source")
    wanted = {key for key in keys() if config.is_set(key) and key not in changed}
    assert len(wanted) > 4
    differing = {
        key: (settled.get(key), config.get(key))
        for key in wanted
        if settled.get(key) != config.get(key)
    }
    assert not differing
    checkpoint = load_checkpoint(run / "last.pt")
    shapes = {name: tensor.shape for name, tensor in checkpoint.model.items()}
    with torch.device("meta"):
        network = GPT(settled.model)
    assert shapes == {name: p.shape for name, p in network.named_parameters()}
    shape = settled.model if config.model.init_from in NAMES else config.model
    qkv_bias = shape.bias if shape.qkv_bias is None else shape.qkv_bias
    assert ("h.0.attn.c_attn.bias" in shapes) == qkv_bias
    assert shapes["wte.weight"][0] == (config.model.vocab_size or shapes["wte.weight"][0])
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "lr" in line] == [1, 2]
    rates = [line["lr"] for line in lines if "lr" in line]
    assert max(rates) == pytest.approx(config.optim.lr, rel=0.6)
    assert any(line.get("val_loss") is not None for line in lines) == (
        config.data.val_fraction != 0
    )
    assert len((run / "samples.jsonl").read_text().splitlines()) >= (
        2 if config.train.sample_every else 1
    )


def test_the_best_epoch_of_input_txt_is_kept(gpt: Any) -> None:
    Path("input.txt").write_text(STORY * 4, encoding="utf-8", newline="\n")
    small = (
        "model.n_layer=1", "model.n_head=2", "model.n_embd=8", "train.log_every=1", "optim.lr=3e-3",
        "generate.max_new_tokens=4", "device=cpu", "compile=false",
    )  # fmt: skip
    words = [part for word in small for part in ("-s", word)]
    done = gpt("train", "-c", "input-txt", *words, "--json")
    assert done.code == 0, done.err
    run = Path("runs/input-txt")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if "epoch" in line]
    assert [line["epoch"] for line in epochs] == list(range(1, 26))
    rates = [line["lr"] for line in lines if "lr" in line]
    assert rates == sorted(rates, reverse=True) and rates[-1] < 1e-4
    assert all(line["tokens"] == 128 * line["step"] for line in lines if "tokens" in line)
    best = min(epochs, key=lambda line: line["train_loss"])
    assert load_checkpoint(run / "best.pt").state["step"] == best["step"]


def test_two_files_of_characters_with_a_vocabulary_and_another_batch(
    gpt: Any, corpus: Path
) -> None:
    write_texts(corpus)
    small = ["model.n_layer=1", "model.n_embd=16", "train.max_steps=2", "train.micro_batch_size=3",
             "device=cpu", "compile=false", "generate.max_new_tokens=4"]  # fmt: skip
    words = ["-c", "openwebtext-char", *(part for word in small for part in ("-s", word))]
    built = gpt("train", *words, "--json")
    assert built.code == 0, built.err
    assert built.json["tokens"] == 2 * 3 * 128
    Path("vocab.txt").write_text("abc", encoding="utf-8")
    refused = gpt("train", *words, "-s", "tokenizer.path=vocab.txt", "--overwrite")
    assert refused.code == 3 and "another tokenizer" in refused.err


def test_stories_held_out_of_the_training_part_are_not_counted_as_missing(
    hub: Any, fork_server: Gpt
) -> None:
    done = fork_server("prepare", "tinystories", "-c", "tinystories-small", env=hub.env)
    assert done.code == 0, done.err
    # Ours has fewer, and is told how many there should be.
    assert "should have 2,119,719 documents, but 200 were found" in done.err
