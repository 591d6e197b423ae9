"""`gpt eval` against a plain loop with the transformers library, on the same network and text."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM


@pytest.mark.parametrize("stride", [16, 5, 1])
def test_perplexity_is_that_of_a_plain_loop_with_transformers(
    gpt: Any, run: Path, corpus: Path, stride: int
) -> None:
    assert gpt("export", "--checkpoint", str(run), "--to", "hf", "out").code == 0
    text = corpus.read_bytes()[:600]
    Path("text.txt").write_bytes(text)
    found = gpt("eval", str(run), "--text", "text.txt", "--stride", str(stride), "--json").json
    model = AutoModelForCausalLM.from_pretrained("out").eval()
    nats, scored = 0.0, 0
    for start in range(0, len(text) - 1, stride):
        ids = torch.tensor([list(text[start : start + 17])])  # a context of 16 and what follows
        with torch.no_grad():
            log_p = model(ids[:, :-1]).logits[0].log_softmax(-1)
        losses = -log_p.gather(-1, ids[0, 1:, None])[:, 0]
        new = start + len(losses) - scored  # what earlier windows have not scored
        nats, scored = nats + float(losses[len(losses) - new :].sum()), scored + new
        if scored == len(text) - 1:
            break
    assert scored == found["tokens"] == len(text) - 1
    assert found["perplexity"] == pytest.approx(math.exp(nats / scored), rel=1e-4)
