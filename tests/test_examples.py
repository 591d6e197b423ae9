"""Every shipped example: valid, buildable at full size, and able to train."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gptcli.config import load_config
from gptcli.config.loader import example_files
from gptcli.model import GPT

EXAMPLES = example_files()
SHRINK = (
    "model.n_layer=2", "model.n_head=2", "model.n_kv_head=null", "model.n_embd=32",
    "model.block_size=16", "model.vocab_size=null", "data.seq_len=null", "data.stride=null",
    "data.dir=data/shrunk", "train.max_steps=2", "train.max_epochs=null",
    "train.tokens_per_step=null", "train.micro_batch_size=2", "train.eval_every=1",
    "train.eval_tokens=64", "generate.max_new_tokens=4", "generate.prompt=The", "device=cpu",
    "compile=false",
)  # fmt: skip


def test_there_are_examples() -> None:
    assert {"quickstart", "overfit"} <= {path.stem for path in EXAMPLES}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_full_size_networks_can_be_built(path: Path) -> None:
    config = load_config(str(path))
    vocab_size = config.model.vocab_size or {"gpt2": 50257, "bpe": config.tokenizer.vocab_size}.get(
        config.tokenizer.name, 257
    )
    with torch.device("meta"):
        model = GPT(config.model.model_copy(update={"vocab_size": vocab_size}))
        tokens = torch.zeros(1, config.seq_len, dtype=torch.int64)
        logits = model(tokens).logits
    assert logits.shape == (1, config.seq_len, vocab_size)
    assert config.data.source is not None, "an example says what to prepare"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_train_two_steps(path: Path, gpt: Any, corpus: Path) -> None:
    words = [part for word in (*SHRINK, f"data.source={corpus}") for part in ("-s", word)]
    config = load_config(str(path))
    if config.tokenizer.name == "bpe":
        words += ["-s", "tokenizer.vocab_size=300"]
    if config.model.init_from != "scratch":
        shape = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=24)
        GPT2LMHeadModel(shape).save_pretrained("small")
        words += ["-s", "model.init_from=small"]
    assert gpt("prepare", "-c", str(path), *words).code == 0
    done = gpt("train", "-c", str(path), *words, "--json")
    assert done.code == 0, done.err
    assert done.json["step"] == 2


def test_examples_are_found_by_name(gpt: Any) -> None:
    assert load_config("quickstart").name == "quickstart"
