"""Rows shorter than the context: learned positions beyond them are never trained, nor used."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcli import generate, load
from gptcli.checkpoint import load_model

GREEDY = ("--temperature", "0")  # what is drawn may be end-of-text at once
SHORT = ("-s", "model.block_size=64", "-s", "data.seq_len=16")


@pytest.fixture
def short(gpt: Any, tiny_set: list[str]) -> Any:
    done = gpt("train", *tiny_set, *SHORT, "-s", "generate.max_new_tokens=40", "--json")
    assert done.code == 0, done.err
    return done.json


def test_eval_keeps_to_the_trained_length(gpt: Any, short: Any) -> None:
    found = gpt("eval", "tiny", "--max-tokens", "64", "--json").json
    assert found["context"] == 16
    assert found["loss"] == pytest.approx(short["val_loss"], abs=1e-5)
    longer = gpt("eval", "tiny", "-s", "data.seq_len=32")
    assert longer.code == 2 and "16 that runs/tiny/best.pt was trained on" in longer.err


def test_generate_keeps_to_it_and_export_does_not(gpt: Any, short: Any) -> None:
    assert load("tiny").model.config.block_size == 16
    drawn = gpt("generate", "--checkpoint", "tiny", "--max-new-tokens", "40", *GREEDY, "--json")
    assert drawn.json["samples"][0]["tokens"] == 40  # beyond what it was trained to see at once
    assert gpt("generate", "--checkpoint", "tiny", "x" * 20).code == 2
    last = load("tiny").path
    assert load_model(last, torch.device("cpu"), whole=True).model.config.block_size == 64
    assert gpt("export", "--checkpoint", "tiny", "--to", "nanogpt", "out.pt").code == 0
    assert torch.load("out.pt", weights_only=True)["model_args"]["block_size"] == 64


def test_a_sample_while_training_is_that_of_generate(gpt: Any, tiny_set: list[str]) -> None:
    words = ["-s", "generate.max_new_tokens=40", "-s", "generate.temperature=0", "-s", "name=one"]
    assert gpt("train", *tiny_set, *SHORT, *words).code == 0
    last = Path("runs/one/samples.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["text"] == "".join(generate(load("runs/one/last.pt")))


@pytest.mark.parametrize(
    "usual", ["model.position=rope", "model.init_from=other"], ids=["rotary", "weights from before"]
)
def test_rotary_positions_and_weights_from_elsewhere_keep_the_whole_context(
    gpt: Any, tiny_set: list[str], usual: str
) -> None:
    if "init_from" in usual:
        assert gpt("train", *tiny_set, "-s", "name=other", "-s", "model.block_size=64").code == 0
    found = gpt("train", *tiny_set, *SHORT, "-s", usual)
    assert found.code == 0, found.err
    assert load("tiny").model.config.block_size == 64
