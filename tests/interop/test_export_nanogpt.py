"""Exports for nanoGPT, loaded into a copy of its network."""

from pathlib import Path
from typing import Any

import pytest
import torch

from gptcli.errors import ConfigError
from gptcli.interop.export import export

from .exports import LLAMA, trained
from .nanogpt_network import NanoGPT


@pytest.mark.parametrize("bias", [False, True])
def test_nanogpt_loads_it(bias: bool) -> None:
    made = trained(rows=320, bias=bias, mlp="gelu_erf")
    done = export(made, "nanogpt", Path("ckpt.pt"))
    assert done.logit_difference < 1e-4 and done.notes == ()
    content = torch.load("ckpt.pt", weights_only=True)
    theirs = NanoGPT(content["model_args"])
    missing, unexpected = theirs.load_state_dict(content["model"], strict=True)
    assert not missing and not unexpected
    tokens = torch.randint(257, (2, 24))
    with torch.no_grad():
        found, expected = theirs(tokens), made.model(tokens).logits[..., :257]
    assert (found - expected).abs().max() < 1e-4
    # As its train.py resumes: two groups, matrices first.
    parameters = list(theirs.parameters())
    optimizer = torch.optim.AdamW(
        [{"params": [p for p in parameters if p.dim() >= 2]},
         {"params": [p for p in parameters if p.dim() < 2]}]
    )  # fmt: skip
    optimizer.load_state_dict(content["optimizer"])
    assert content["iter_num"] == 7 and content["best_val_loss"] == 2.5


def test_nanogpt_of_the_tanh_gelu_says_so() -> None:
    done = export(trained(), "nanogpt", Path("ckpt.pt"))
    assert "exact GELU" in done.notes[0] and done.logit_difference < 0.05


@pytest.mark.parametrize(
    ("shape", "key"),
    [(LLAMA, "model.norm=rmsnorm"), ({"tie_embeddings": False}, "model.tie_embeddings=false"),
     ({"n_inner": 64}, "model.n_inner=64"), ({"mlp": "relu2"}, "model.mlp=relu2")],
)  # fmt: skip
def test_nanogpt_refuses_what_it_does_not_have(shape: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=key):
        export(trained(**shape), "nanogpt", Path("ckpt.pt"))
