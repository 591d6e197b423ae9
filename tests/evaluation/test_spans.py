"""The same text has the same parts, and so the same standard error, whatever scores it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gptcli.config import Config, ModelConfig, load_config
from gptcli.data.shards import TokenReader, read_manifest
from gptcli.device import init_runtime
from gptcli.evaluation import TokenArray, evaluate
from gptcli.evaluation.metrics import span_length
from gptcli.model import GPT

CPU = init_runtime(load_config(None, flags={"device": "cpu", "dtype": "float32"}))


def test_a_split_and_the_same_text_have_one_standard_error(
    tiny: Callable[..., Config], data: Path
) -> None:
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=16, block_size=16, vocab_size=257))
    model.init_weights(1)
    with TokenReader(data, read_manifest(data), "train") as split:
        text = TokenArray(split.read(0, len(split)).astype(np.uint16))
        errors = {
            scored.standard_error
            for tokens, parts in ((split, None), (text, None), (text, lambda places: places // 999))
            if (scored := evaluate(model, tokens, CPU, context=16, span_of=parts)) is not None
        }
    assert len(errors) == 1


def test_parts_depend_on_the_text_alone() -> None:
    assert span_length(100) == span_length(30_000) == 128 and span_length(2_560_000) == 10_000


def test_eval_names_the_data_that_it_scored(gpt: Any, run: Path, corpus: Path, data: Path) -> None:
    one = gpt("eval", "tiny")
    assert f"on val of {data}:" in one.out, one.out
    both = gpt("eval", "tiny", "runs/tiny/last.pt")
    assert f"scored on val of {data}\n" in both.out and " minus " in both.out
    told = gpt("eval", "tiny", "--text", str(corpus), "--json").json
    assert told["data"] == str(corpus) and told["split"] == "text"
