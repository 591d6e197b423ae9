"""Runs that learn adapters: small checkpoints, a base that never changes, exact resume."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptcli.checkpoint import load_checkpoint, load_model
from gptcli.model.lora import is_adapter
from support.pretrained import gpt2, shaken

SETS = (
    "train.max_steps=4", "train.micro_batch_size=2", "train.eval_every=2", "train.log_every=1",
    "train.eval_tokens=64", "generate.max_new_tokens=4", "device=cpu", "dtype=float32",
    "compile=false", "name=tuned", "model.init_from=theirs", "model.lora.rank=2", "optim.lr=1e-2",
)  # fmt: skip


@pytest.fixture
def words(data: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Return command-line words for a brief run on a GPT-2 of transformers in `theirs`."""
    shaken(gpt2(2, 4, 32, vocab_size=257)).save_pretrained(tmp_path / "theirs")

    def make(*sets: str) -> list[str]:
        return [part for word in (*SETS, f"data.dir={data}", *sets) for part in ("-s", word)]

    return make


RUN = Path("runs/tuned")


def test_checkpoints_hold_the_adapters_and_the_run_their_base_once(gpt: Any, words: Any) -> None:
    done = gpt("train", *words(), "--json")
    assert done.code == 0, done.err
    assert "parameters learn" in done.err
    content = torch.load(RUN / "best.pt", weights_only=True)
    assert content["model"] and all(map(is_adapter, content["model"]))
    assert set(content["optimizer"]) == set(content["model"])
    assert (RUN / "best.pt").stat().st_size < (RUN / "base.pt").stat().st_size
    # The base is a checkpoint like any other, and has not changed by a bit.
    first = load_model(RUN / "base.pt", torch.device("cpu"))
    origin = gpt("train", *words("model.lora=null", "name=plain", "train.max_steps=1"))
    assert origin.code == 0, origin.err
    start = load_checkpoint(Path("runs/plain/checkpoints/step-00000000.pt")).model
    found = load_checkpoint(RUN / "best.pt").model
    for name, weight in first.model.named_parameters():
        assert torch.equal(weight, start[name]) and torch.equal(found[name], start[name])
    # What eval and generate use is the network with its adapters.
    trained = load_model(RUN / "best.pt", torch.device("cpu")).model
    assert trained.config.lora is None
    assert not torch.equal(trained.h[0].attn.c_attn.weight, start["h.0.attn.c_attn.weight"])
    tuned, base = (
        gpt("eval", "--checkpoint", str(RUN / name), "--max-tokens", "64", "--json").json["loss"]
        for name in ("best.pt", "base.pt")
    )
    assert tuned == pytest.approx(done.json["best_val_loss"], abs=1e-4) and tuned < base
    assert gpt("generate", "--checkpoint", "tuned", "ab").code == 0


def test_resuming_is_exact_and_needs_no_origin(gpt: Any, words: Any) -> None:
    assert gpt("train", *words("name=whole", "optim.schedule=constant")).code == 0
    half = words("optim.schedule=constant")
    assert gpt("train", *half, "-s", "train.max_steps=2").code == 0
    shutil.rmtree("theirs")
    before = (RUN / "base.pt").read_bytes()
    done = gpt("train", *half, "--resume")
    assert done.code == 0, done.err
    assert (RUN / "base.pt").read_bytes() == before
    one, two = (load_checkpoint(Path(f"runs/{name}/last.pt")) for name in ("whole", "tuned"))
    assert all(torch.equal(one.model[name], two.model[name]) for name in one.model)
    for name, state in one.optimizer.items():
        assert all(torch.equal(state[key], two.optimizer[name][key]) for key in state)
    refused = gpt("train", *words("model.lora.rank=4"), "--resume")
    assert refused.code == 2 and "model.lora" in refused.err


def test_adapters_without_their_base_say_so(gpt: Any, words: Any, tmp_path: Path) -> None:
    assert gpt("train", *words()).code == 0
    shutil.copy(RUN / "best.pt", tmp_path / "alone.pt")
    alone = gpt("eval", "--checkpoint", "alone.pt")
    assert alone.code == 4 and "base.pt" in alone.err and "gpt export" in alone.err
    shutil.copy(RUN / "base.pt", tmp_path / "base.pt")
    assert gpt("eval", "--checkpoint", "alone.pt").code == 0
    other = words("name=other", "train.max_steps=1", "model.init_from=runs/tuned")
    assert gpt("train", *other).code == 0
    shutil.copy("runs/other/base.pt", tmp_path / "base.pt")
    mixed = gpt("eval", "--checkpoint", "alone.pt")
    assert mixed.code == 4 and "not the weights" in mixed.err
    raw = bytearray((RUN / "base.pt").read_bytes())
    raw[len(raw) // 2] ^= 1
    (RUN / "base.pt").write_bytes(raw)
    damaged = gpt("train", *words("train.max_steps=6"), "--resume")
    assert damaged.code == 4 and "base.pt" in damaged.err


def test_exports_and_further_runs_have_the_adapters_merged(gpt: Any, words: Any) -> None:
    from transformers import GPT2LMHeadModel

    assert gpt("train", *words()).code == 0
    done = gpt("export", "--checkpoint", "tuned", "--to", "hf", "out", "--json")
    assert done.code == 0 and done.json["logit_difference"] < 1e-4, done.err
    assert "lora" not in Path("out/config.json").read_text()
    theirs = GPT2LMHeadModel.from_pretrained("out")
    ours = load_model(RUN / "best.pt", torch.device("cpu")).model
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        logits = ours(tokens).logits
        assert logits is not None
        assert (theirs(tokens).logits - logits).abs().max() < 1e-4
    # A run on top of it starts where this one ended.
    again = words("name=again", "model.init_from=runs/tuned", "model.lora=null", "optim.lr=1e-9")
    assert gpt("train", *again).code == 0
    end = json.loads((RUN / "status.json").read_text())["summary"]["val_loss"]
    rows = [json.loads(line) for line in Path("runs/again/metrics.jsonl").read_text().splitlines()]
    first = next(row["val_loss"] for row in rows if "val_loss" in row)
    best = json.loads((RUN / "status.json").read_text())["summary"]["best_val_loss"]
    assert first == pytest.approx(best, abs=1e-4) and best <= end


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (["model.init_from=scratch"], "model.lora: adapters need weights"),
        (["model.lora.rang=2"], "did you mean 'model.lora.rank'"),
        (["model.lora.rank=0"], "model.lora.rank"),
        (["model.lora.targets=[c_attn]"], "model.lora.targets"),
        (["model.lora.targets=[mlp.c_gate]"], "only mlp = swiglu"),
        (["model.lora=true"], "model.lora"),
        (["train.freeze=[h]"], "everything is frozen"),
    ],
)
def test_settings_that_are_refused(gpt: Any, words: Any, sets: list[str], says: str) -> None:
    refused = gpt("train", *words(*sets))
    assert refused.code == 2 and says in refused.err, refused.err


def test_adapters_are_averaged(gpt: Any, words: Any) -> None:
    assert gpt("train", *words()).code == 0
    plain = torch.load(RUN / "last.pt", weights_only=True)
    averaged = words("train.ema=0.9", "name=averaged")
    assert gpt("train", *averaged).code == 0
    content = torch.load(Path("runs/averaged/last.pt"), weights_only=True)
    assert content["model"].keys() == plain["model"].keys()
    for name, weight in plain["model"].items():
        assert torch.equal(content["optimizer"][name]["weight"], weight)
    assert gpt("train", *averaged, "-s", "train.max_steps=6", "--resume").code == 0
    assert gpt("eval", "--checkpoint", "averaged", "--json").json["loss"] > 0
