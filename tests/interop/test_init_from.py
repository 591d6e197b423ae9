"""Runs that start from the weights of others: what holds, what is refused, what is remembered."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from gptcli.checkpoint import load_checkpoint, load_model, save_checkpoint
from gptcli.config import ModelConfig
from gptcli.data.loader import TokenLoader
from gptcli.data.shards import TokenReader, read_manifest
from gptcli.errors import CheckpointError
from gptcli.interop.hf_weights import GPT2_REVISIONS
from gptcli.interop.pretrained import open_pretrained
from gptcli.interop.weights import resize_vocab
from gptcli.training.events import StepDone
from gptcli.training.loop import train
from support.commands import Gpt
from support.hub import COMMIT, Hub
from support.pretrained import gpt2, ours_of, shaken
from support.runs import Tiny

from .nanogpt_network import save_nanogpt

BRIEF = (
    "train.max_steps=3", "train.micro_batch_size=2", "train.eval_every=3", "train.log_every=1",
    "train.eval_tokens=64", "generate.max_new_tokens=4", "device=cpu", "dtype=float32",
    "compile=false", "name=tuned",
)  # fmt: skip


@pytest.fixture
def words(data: Path) -> Callable[..., list[str]]:
    """Return command-line words for a brief run on the prepared bytes."""

    def make(*sets: str) -> list[str]:
        every = (*BRIEF, f"data.dir={data}", *sets)
        return [part for word in every for part in ("-s", word)]

    return make


@pytest.fixture
def theirs(tmp_path: Path) -> Any:
    """A GPT-2 of transformers for byte tokens, in the folder `theirs`."""
    model = shaken(gpt2(2, 4, 32, vocab_size=257))
    model.save_pretrained(tmp_path / "theirs")
    return model


def losses(gpt: Any, words: list[str]) -> tuple[list[float], dict[str, Any]]:
    """Train and return the loss of every step, and the JSON result."""
    done = gpt("train", *words, "--json")
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in Path("runs/tuned/metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line], done.json


def test_the_imported_shape_wins_over_the_defaults(gpt: Any, words: Any, theirs: Any) -> None:
    # Nothing of the shape is set: 2 blocks of width 32 and a context of 24 come with the weights.
    first, result = losses(gpt, words("model.init_from=theirs", "optim.lr=1e-3"))
    assert result["step"] == 3
    found = load_checkpoint(Path(result["checkpoint"]))
    shape = found.config["model"]
    assert (shape["n_layer"], shape["n_embd"], shape["block_size"]) == (2, 32, 24)
    assert shape["bias"] is True and shape["vocab_size"] == 257
    assert found.config["data"]["seq_len"] == 24
    assert found.state["origin"] == {"init_from": "theirs", "revision": None}
    assert json.loads(Path("runs/tuned/run.json").read_text())["origin"] == found.state["origin"]
    # The first loss is that of the weights: transformers computes the same on the same tokens.
    own = load_model(Path("runs/tuned/checkpoints/step-00000003.pt"), torch.device("cpu"))
    assert own.checkpoint.config["model"]["init_from"] == "theirs"
    assert len(first) == 3 and first[2] < first[0]


def test_resuming_does_not_need_the_origin(gpt: Any, words: Any, theirs: Any) -> None:
    assert gpt("train", *words("model.init_from=theirs")).code == 0
    shutil.rmtree("theirs")
    more = words("model.init_from=theirs", "train.max_steps=5")
    done = gpt("train", *more, "--resume", "--json")
    assert done.code == 0, done.err
    assert done.json["step"] == 5
    found = load_checkpoint(Path("runs/tuned/last.pt"))
    assert found.state["origin"]["init_from"] == "theirs"
    for sets in (["model.n_layer=3"], ["model.init_from=elsewhere"], ["model.block_size=16"]):
        refused = gpt("train", *words("model.init_from=theirs", *sets), "--resume")
        assert refused.code == 2 and sets[0].split("=")[0] in refused.err, refused.err


def test_a_checkpoint_older_than_a_key_was_made_with_its_default(gpt: Any, run: Path) -> None:
    file = run / "checkpoints/step-00000006.pt"
    found = load_checkpoint(file)
    for key in ("n_inner", "head_dim", "norm_eps", "rope_theta"):
        del found.config["model"][key]
    del found.config["train"]["freeze"], found.state["origin"]
    save_checkpoint(file, found)
    words = ["-c", str(run / "config.yaml"), "-s", "name=tiny", "-s", "train.max_steps=8"]
    done = gpt("train", *words, "--resume", "--json")
    assert done.code == 0 and done.json["step"] == 8, done.err
    refused = gpt("train", *words, "-s", "model.norm_eps=1e-6", "--resume")
    assert refused.code == 2 and "model.norm_eps (1e-05 there, 1e-06 here)" in refused.err


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("model.n_layer=3", "model.n_layer: 3 is set, but theirs has 2"),
        ("model.n_embd=64", "model.n_embd: 64 is set, but theirs has 32"),
        ("model.norm=rmsnorm", "model.norm: rmsnorm is set, but theirs has layernorm"),
        ("model.bias=false", "model.bias: false is set, but theirs has true"),
        ("model.qkv_bias=false", "model.qkv_bias: false is set, but theirs has true"),
        ("model.block_size=48", "model.block_size: 48 is set, but theirs has 24"),
        ("model.vocab_size=200", "it can only be made larger"),
        ("data.seq_len=25", "data.seq_len: 25 is longer than model.block_size = 24"),
        ("train.tokens_per_step=50", "is not a multiple of micro_batch_size * seq_len = 48"),
    ],
)
def test_a_setting_that_contradicts_the_shape_is_refused(
    gpt: Any, words: Any, theirs: Any, setting: str, says: str
) -> None:
    for flags in ([], ["--dry-run"]):
        done = gpt("train", *words("model.init_from=theirs", setting), *flags)
        assert done.code == 2 and says in done.err, done.err
        assert len(done.err_lines) <= 3
    assert not Path("runs/tuned/last.pt").exists()


@pytest.mark.parametrize(
    "setting",
    ["model.n_layer=2", "model.n_kv_head=4", "model.n_inner=128", "model.head_dim=8",
     "model.qkv_bias=true", "model.dropout=0.1", "model.n_kv_head=null"],
)  # fmt: skip
def test_a_setting_that_agrees_with_the_shape_is_taken(
    gpt: Any, words: Any, theirs: Any, setting: str
) -> None:
    done = gpt("train", *words("model.init_from=theirs", setting), "--dry-run", "--json")
    assert done.code == 0, done.err
    assert done.json["init_from"] == "theirs"
    assert done.json["parameters"] == theirs.num_parameters()


def test_a_shorter_context_and_more_rows(gpt: Any, words: Any, theirs: Any) -> None:
    plain, _ = losses(gpt, words("model.init_from=theirs", "model.block_size=16"))
    shutil.rmtree("runs")
    sets = ("model.init_from=theirs", "model.block_size=16", "model.vocab_size=320")
    padded, result = losses(gpt, words(*sets))
    found = load_checkpoint(Path(result["checkpoint"]))
    assert found.model["wpe.weight"].shape == (16, 32)
    assert found.model["wte.weight"].shape == (320, 32)
    # Rows of the mean take their share of the probability and no more (Jensen).
    assert 0 <= padded[0] - plain[0] <= math.log(320 / 257)


def test_padding_is_the_mean_row() -> None:
    weights = {"wte.weight": torch.tensor([[1.0, 2.0], [3.0, 6.0]]), "ln_f.weight": torch.ones(2)}
    fitted = resize_vocab(weights, ModelConfig(n_head=1, n_embd=2, vocab_size=4))
    assert fitted["wte.weight"].tolist() == [[1, 2], [3, 6], [2, 4], [2, 4]]
    assert fitted["ln_f.weight"] is weights["ln_f.weight"]


def test_other_tokens_than_those_of_the_weights_are_refused(gpt: Any, words: Any) -> None:
    shaken(gpt2(1, 2, 16, vocab_size=50257)).save_pretrained("english")
    done = gpt("train", *words("model.init_from=english"))
    assert done.code == 2
    assert "english was trained on other tokens than those of the 'bytes' tokenizer" in done.err
    assert "tokenizer.name=gpt2" in done.err


def test_a_vocabulary_that_comes_along_is_compared(gpt: Any, words: Any, theirs: Any) -> None:
    Path("theirs/vocab.json").write_text(json.dumps({"a": 0, "<|endoftext|>": 256}))
    done = gpt("train", *words("model.init_from=theirs"))
    assert done.code == 2 and "256 of 257 ids mean something else" in done.err, done.err


def test_a_run_of_ours_is_a_start(gpt: Any, run: Path, words: Any) -> None:
    first = load_checkpoint(run / "best.pt")
    _, result = losses(gpt, words("model.init_from=tiny", "optim.lr=1e-9"))
    found = load_checkpoint(Path(result["checkpoint"]))
    assert found.state["origin"] == {
        "init_from": "tiny", "revision": f"step {first.state['step']}"
    }  # fmt: skip
    assert found.state["step"] == 3
    for name, weight in found.model.items():
        assert torch.allclose(weight, first.model[name], atol=1e-6), name


@pytest.mark.parametrize("damage", ["cut", "bin", "missing"])
def test_bad_weights_end_with_4_and_leave_no_checkpoint(
    gpt: Any, words: Any, theirs: Any, damage: str
) -> None:
    file = Path("theirs/model.safetensors")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:5000])
    elif damage == "bin":
        file.rename("theirs/pytorch_model.bin")
    name = "nowhere" if damage == "missing" else "theirs"
    done = gpt("train", *words(f"model.init_from={name}"))
    assert done.code == 4, done.err
    assert 1 <= len(done.err_lines) <= 3 and "Traceback" not in done.err
    assert list(Path("runs").rglob("*.pt")) == []


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_a_nanogpt_checkpoint_goes_on_with_its_own_first_loss(
    tiny: Tiny, bias: bool, prefix: str
) -> None:
    theirs = save_nanogpt(Path("ckpt.pt"), bias=bias, prefix=prefix).eval()
    # The defaults' shape is told by what is set; this run sets none of it.
    sets = [word for word in BRIEF if not word.startswith("name=")]
    config = tiny(*sets, name="tuned")
    unset = {"n_layer", "n_head", "n_embd", "block_size"}
    values = {
        k: v for k, v in config.model.model_dump(exclude_unset=True).items() if k not in unset
    }
    model = type(config.model)(**values | {"init_from": "ckpt.pt"})
    config = config.model_copy(update={"model": model})
    events = list(train(config))
    first = next(event for event in events if isinstance(event, StepDone))

    folder = Path(config.data.dir or "")
    with TokenReader(folder, read_manifest(folder), "train") as tokens:
        loader = TokenLoader(tokens, seq_len=24, stride=24, windows_per_step=2, seed=config.seed)
        [(rows, targets)] = loader.micro_batches(0, 2)
        with torch.no_grad():
            own = functional.cross_entropy(theirs(rows).flatten(0, 1), targets.flatten())
    assert abs(first.loss - float(own)) < 1e-5
    assert load_checkpoint(config.run_folder / "last.pt").state["origin"]["revision"] == "step 7"


def test_a_fork_of_nanogpt_with_other_parts_is_refused() -> None:
    save_nanogpt(Path("ckpt.pt"), bias=False, use_rmsnorm=True)
    with pytest.raises(CheckpointError, match="model_args has 'use_rmsnorm'"):
        open_pretrained("ckpt.pt")


# Frozen modules.


def test_what_is_frozen_does_not_change_by_a_bit(gpt: Any, words: Any, theirs: Any) -> None:
    sets = ("model.init_from=theirs", 'train.freeze=[wte, wpe, "h.0-0"]', "optim.weight_decay=0.5")
    _, result = losses(gpt, words(*sets, "optim.lr=1e-2"))
    found = load_checkpoint(Path(result["checkpoint"]))
    before = load_checkpoint(Path("runs/tuned/checkpoints/step-00000003.pt"))
    assert before.state["step"] == 3
    start = dict(ours_of("theirs").named_parameters())
    changed = {name for name, weight in found.model.items() if not torch.equal(weight, start[name])}
    assert changed and all(name.startswith(("h.1.", "ln_f.")) for name in changed)
    assert changed == found.optimizer.keys()
    assert len(changed) == sum(name.startswith(("h.1.", "ln_f.")) for name in start)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_freezing_may_change_on_resume(gpt: Any, words: Any, theirs: Any, name: str) -> None:
    start = ("model.init_from=theirs", f"optim.name={name}")
    assert gpt("train", *words(*start, 'train.freeze=["h.0-1"]')).code == 0
    frozen = load_checkpoint(Path("runs/tuned/last.pt"))
    assert not any(parameter.startswith("h.") for parameter in frozen.optimizer)
    later = words(*start, "train.freeze=[wte, h.0.attn]", "train.max_steps=5")
    done = gpt("train", *later, "--resume")
    assert done.code == 0 and "train.freeze changed from" in done.err, done.err
    thawed = load_checkpoint(Path("runs/tuned/last.pt"))
    assert torch.equal(thawed.model["wte.weight"], frozen.model["wte.weight"])
    assert not torch.equal(thawed.model["h.1.mlp.c_fc.weight"], frozen.model["h.1.mlp.c_fc.weight"])
    assert "wte.weight" not in thawed.optimizer and "h.1.ln_1.weight" in thawed.optimizer


@pytest.mark.parametrize(
    ("names", "says"),
    [
        ("[wtf]", "nothing is named 'wtf'; there are wte, wpe, h.N.ln_1, h.N.attn.c_attn"),
        ('["h.0-5"]', "nothing is named 'h.2'"),
        ('["h.1-0"]', "the range ends before it begins"),
        ('["h.0.atn"]', "h.N.mlp.c_proj, ln_f, with N from 0 to 1"),
        ("[lm_head]", "lm_head is wte itself"),
        ('[wte, wpe, "h.0-1", ln_f]', "nothing is left to train"),
        ('["h.0-999999999"]', "nothing is named 'h.2'"),
        (f'["h.0-{"9" * 5000}"]', "nothing is named 'h.0-999"),
    ],
)
def test_what_cannot_be_frozen(gpt: Any, words: Any, theirs: Any, names: str, says: str) -> None:
    for flags in ([], ["--dry-run"]):
        done = gpt("train", *words("model.init_from=theirs", f"train.freeze={names}"), *flags)
        assert done.code == 2 and says in done.err, done.err


# The Hub.


@pytest.fixture
def english(gpt: Any, corpus: Path) -> list[str]:
    """A run on gpt2 tokens from the Hub's gpt2, as command-line words."""
    done = gpt("prepare", str(corpus), "--out", "data/english")
    assert done.code == 0, done.err
    every = (*BRIEF, "data.dir=data/english", "model.init_from=gpt2")
    return ["train", *(part for word in every for part in ("-s", word)), "--json"]


def test_gpt2_of_the_hub_end_to_end(gpt_at: Gpt, english: list[str]) -> None:
    # 26 MB: huggingface_hub keeps what came in pieces of 10 MiB.
    shaken(gpt2(1, 2, 128, vocab_size=50257)).save_pretrained("theirs")
    files = {path.name: path.read_bytes() for path in Path("theirs").iterdir()}
    repositories = {"openai-community/gpt2": files}
    # Half of the weights come, then the line is cut: the rest is asked for, not all again.
    with Hub(repositories, {"model.safetensors": ["cut"]}) as hub:
        done = gpt_at(hub.url, *english)
    assert done.code == 0, done.err
    assert done.json["step"] == 3
    [(resumed, start)] = hub.ranges
    assert resumed == "model.safetensors" and 10_000_000 < start < 13_000_000
    revision = GPT2_REVISIONS["gpt2"]
    fetched = [request for request in hub.requests if "resolve" in request]
    assert fetched and all(f"/resolve/{revision}/" in request for request in fetched)
    state = load_checkpoint(Path("runs/tuned/last.pt")).state
    assert state["origin"] == {"init_from": "gpt2", "revision": revision}
    # What is in the cache needs no network.
    shutil.rmtree("runs")
    done = gpt_at("http://127.0.0.1:9", *english)
    assert done.code == 0, done.err


def test_a_named_model_is_pinned_to_the_commit_it_has_now(gpt_at: Gpt, english: list[str]) -> None:
    shaken(gpt2(1, 2, 16, vocab_size=50257)).save_pretrained("theirs")
    files = {path.name: path.read_bytes() for path in Path("theirs").iterdir()}
    with Hub({"me/small": files}) as hub:
        done = gpt_at(hub.url, *english, "-s", "model.init_from=hf:me/small")
        assert done.code == 0, done.err
    state = load_checkpoint(Path("runs/tuned/last.pt")).state
    assert state["origin"] == {"init_from": "hf:me/small", "revision": COMMIT}
    assert any(f"/resolve/{COMMIT}/model.safetensors" in request for request in hub.requests)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("hf:me/pickles", "only pytorch_model.bin, which may run code"),
        ("hf:me/none", "no such repository on the Hub"),
        ("hf:me/empty", "no config.json"),
        ("gpt2-xl", "no such repository on the Hub"),
    ],
)
def test_models_of_the_hub_that_cannot_be_used(
    gpt_at: Gpt, english: list[str], name: str, says: str
) -> None:
    gpt2(1, 2, 16, vocab_size=50257).save_pretrained("theirs")
    config = Path("theirs/config.json").read_bytes()
    pickles = {"config.json": config, "pytorch_model.bin": b"\x80\x04."}
    with Hub({"me/pickles": pickles, "me/empty": {"README.md": b"# Hello"}}) as hub:
        done = gpt_at(hub.url, *english, "-s", f"model.init_from={name}")
    assert done.code == 4, done.err
    assert says in done.err and 1 <= len(done.err_lines) <= 3
    assert not any(request == "GET" and ".bin" in request for request in hub.requests)
    assert list(Path("runs").rglob("*.pt")) == []


def test_without_a_network(gpt_at: Gpt, english: list[str]) -> None:
    done = gpt_at("http://127.0.0.1:9", *english)
    assert done.code == 4, done.err
    assert "the Hub cannot be reached" in done.err and len(done.err_lines) <= 3
    assert list(Path("runs").rglob("*.pt")) == []
