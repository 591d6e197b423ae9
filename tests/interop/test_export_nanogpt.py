"""Exports for nanoGPT, loaded into a copy of its network."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcli.errors import ConfigError
from gptcli.interop.export import export
from gptcli.tokenizers import ByteTokenizer, CharTokenizer, Tokenizer
from gptcli.tokenizers.bpe import gpt2, train_bpe

from .exports import LLAMA, TEXT, trained
from .nanogpt_network import NanoGPT


@pytest.mark.parametrize("bias", [False, True])
def test_nanogpt_loads_it(bias: bool) -> None:
    made = trained(rows=320, bias=bias, mlp="gelu_erf")
    done = export(made, "nanogpt", Path("ckpt.pt"))
    assert done.logit_difference < 1e-4 and not any("GELU" in note for note in done.notes)
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


def vocabulary_of_sample_py(root: Path, out_dir: str) -> Any:
    """Return what nanoGPT's sample.py encodes and decodes by: a meta.pkl, or GPT-2's (None)."""
    checkpoint = torch.load(root / out_dir / "ckpt.pt", weights_only=True)
    if "config" in checkpoint and "dataset" in checkpoint["config"]:
        path = os.path.join(root, "data", checkpoint["config"]["dataset"], "meta.pkl")  # noqa: PTH118
        if os.path.exists(path):  # noqa: PTH110
            return pickle.loads(Path(path).read_bytes())
    return None


def test_sample_py_finds_the_characters() -> None:
    Path("nanoGPT/data").mkdir(parents=True)
    out = Path("nanoGPT/out-mine/ckpt.pt")
    done = export(trained(CharTokenizer("\n abc")), "nanogpt", out)
    meta = vocabulary_of_sample_py(Path("nanoGPT"), "out-mine")
    ids = [meta["stoi"][char] for char in "a cab\n"]
    assert ids == CharTokenizer("\n abc").encode("a cab\n").tolist()
    assert "".join(meta["itos"][id] for id in [*ids, 5]) == "a cab\n<|endoftext|>"
    assert meta["vocab_size"] == 6
    assert "sample.py --out_dir=out-mine" in done.notes[-1]
    assert done.bytes == sum(path.stat().st_size for path in out.parent.iterdir())
    out.unlink()
    with pytest.raises(ConfigError, match=r"meta\.pkl exists"):
        export(trained(CharTokenizer("xyz")), "nanogpt", out)
    export(trained(CharTokenizer("xyz")), "nanogpt", out, force=True)
    assert Path("nanoGPT/out-mine/meta.pkl~1").exists()
    assert "x" in vocabulary_of_sample_py(Path("nanoGPT"), "out-mine")["stoi"]


@pytest.mark.parametrize(
    ("tokenizer", "note"),
    [(ByteTokenizer(), "the bytes vocabulary"), (train_bpe([TEXT], 300), "the bpe vocabulary"),
     (gpt2(), None)],
)  # fmt: skip
def test_a_vocabulary_that_nanogpt_cannot_know_is_named(
    tokenizer: Tokenizer, note: str | None
) -> None:
    done = export(trained(tokenizer, n_layer=1, mlp="gelu_erf"), "nanogpt", Path("out/ckpt.pt"))
    assert vocabulary_of_sample_py(Path(), "out") is None
    assert [path.name for path in Path("out").iterdir()] == ["ckpt.pt"]
    assert done.notes == () if note is None else note in done.notes[0]
    assert done.logit_difference < 1e-4
