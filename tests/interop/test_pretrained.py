"""Weights of other programs, used as they are: talked to, scored, compared, exported."""

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from gptcli import evaluate, generate, load
from gptcli.errors import CheckpointError, ConfigError
from gptcli.interop.hf_tokenizer import tokenizer_json
from gptcli.interop.pretrained import open_pretrained
from gptcli.tokenizers import load_tokenizer
from gptcli.tokenizers.bpe import gpt2 as gpt2_tokenizer
from support.commands import Gpt
from support.hub import Hub
from support.pretrained import gpt2, shaken

from .nanogpt_network import NanoGPT

SHORT = ("--max-new-tokens", "5", "--json", "-s", "device=cpu", "-s", "dtype=float32")
EXACT = ("--json", "-s", "device=cpu")


@pytest.fixture
def theirs(data: Path) -> Any:
    """A GPT-2 of transformers for byte tokens, in the folder `theirs` with its tokenizer."""
    model = shaken(gpt2(2, 4, 32, vocab_size=257))
    model.save_pretrained("theirs")
    content = tokenizer_json(load_tokenizer(data))
    Path("theirs/tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return model


def plain_loss(model: Any, ids: list[int], context: int) -> float:
    """Return a loss by windows that do not overlap, in nats per token."""
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, context):
            x = torch.tensor([ids[start : start + context + 1]])
            found = model(x[:, :-1])
            logits = getattr(found, "logits", found)[0]
            total += float(functional.cross_entropy(logits, x[0, 1:], reduction="sum"))
    return total / (len(ids) - 1)


def test_a_folder_of_hugging_face_is_scored_as_transformers_does(
    gpt: Any, theirs: Any, corpus: Path, data: Path
) -> None:
    done = gpt("eval", "--checkpoint", "theirs", "--text", str(corpus), *EXACT)
    assert done.code == 0, done.err
    assert (done.json["checkpoint"], done.json["step"]) == ("theirs", 0)
    assert done.json["bytes"] == len(corpus.read_bytes()) - 1
    expected = plain_loss(theirs, list(corpus.read_bytes()), 24)
    assert done.json["loss"] == pytest.approx(expected, abs=1e-5)
    on_data = gpt("eval", "theirs", "--data", str(data), *EXACT)
    assert on_data.code == 0, on_data.err
    assert on_data.json["split"] == "val"
    nowhere = gpt("eval", "theirs", *EXACT)
    assert nowhere.code == 3 and "--data DIR, or a file with --text FILE" in nowhere.err


def test_it_is_compared_with_a_run_and_exported(gpt: Any, theirs: Any, run: Path) -> None:
    done = gpt("eval", str(run), "theirs", "--text", "corpus.txt", *EXACT)
    assert done.code == 0, done.err
    assert [found["checkpoint"] for found in done.json["results"]] == [f"{run}/best.pt", "theirs"]
    refused = gpt("export", "--checkpoint", "theirs", "--to", "hf", "again")
    assert refused.code == 2 and "--to nanogpt" in refused.err
    written = gpt("export", "--checkpoint", "theirs", "--to", "nanogpt", "ckpt.pt", "--json")
    assert written.code == 0, written.err
    back = gpt("eval", "ckpt.pt", "--data", "data/tiny", *EXACT)
    there = gpt("eval", "theirs", "--data", "data/tiny", *EXACT)
    assert back.code == 0, back.err
    # nanoGPT's GELU is the exact one.
    assert back.json["loss"] == pytest.approx(there.json["loss"], abs=1e-2)


def test_weights_with_the_vocabulary_of_gpt2_are_exported_as_they_are(gpt: Any) -> None:
    model = shaken(gpt2(1, 2, 16, vocab_size=50257))
    model.save_pretrained("saved")
    done = gpt("export", "--checkpoint", "saved", "--to", "hf", "again", "--json")
    assert done.code == 0, done.err
    assert "started from | saved" in Path("again/README.md").read_text()
    assert done.json["logit_difference"] < 1e-4


def test_text_is_generated_until_the_model_ends_it(gpt: Any, theirs: Any) -> None:
    greedy = ("--temperature", "0")
    first = gpt("generate", "--checkpoint", "theirs", "the cat", *SHORT, *greedy)
    assert first.code == 0, first.err
    ids = list(b"the cat")
    for _ in range(5):
        ids.append(int(theirs(torch.tensor([ids])).logits[0, -1].argmax()))
    [sample] = first.json["samples"]
    if 0 not in ids[7:]:  # conftest's eos_token_id
        assert sample["text"] == bytes(ids[7:]).decode("utf-8", "replace")
    settings = json.loads(Path("theirs/config.json").read_text())
    for end in (ids[8], [300, ids[8]]):
        Path("theirs/generation_config.json").write_text(json.dumps({"eos_token_id": end}))
        ended = gpt("generate", "--checkpoint", "theirs", "the cat", *SHORT, *greedy)
        [sample] = ended.json["samples"]
        assert sample["finish_reason"] == "stop" and sample["tokens"] <= 1, sample
    assert settings["eos_token_id"] == 0


def test_a_run_comes_before_weights_of_the_same_name(gpt: Any, theirs: Any, run: Path) -> None:
    run.rename("runs/gpt2")
    shutil.copytree("theirs", "gpt2")
    for name in ("gpt2", "runs/gpt2"):
        done = gpt("eval", name, *EXACT)
        assert done.code == 0, done.err
        assert done.json["checkpoint"] == "runs/gpt2/best.pt"
    assert gpt("eval", "./gpt2", "--text", "corpus.txt", *EXACT).json["checkpoint"] == "gpt2"


def test_python_takes_them_too(theirs: Any, corpus: Path, data: Path) -> None:
    found = evaluate("theirs", text=corpus, device="cpu")
    assert found.loss == pytest.approx(plain_loss(theirs, list(corpus.read_bytes()), 24), abs=1e-5)
    assert evaluate("theirs", data=data, device="cpu").tokens > 100
    assert len("".join(generate("theirs", "the", max_new_tokens=4, device="cpu"))) <= 4
    trained = load(Path("theirs"), device="cpu")
    assert trained.step == 0 and trained.tokenizer.vocab_size == 257


def test_ids_that_mean_something_else_are_refused(gpt: Any, theirs: Any, corpus: Path) -> None:
    sets = ("--out", "data/char", "-s", "tokenizer.name=char")
    assert gpt("prepare", str(corpus), *sets).code == 0
    done = gpt("eval", "theirs", "--data", "data/char")
    assert done.code == 2 and "theirs was trained on other tokens" in done.err, done.err
    assert "`gpt eval theirs --text FILE` scores text" in done.err, done.err


def test_ids_beside_those_of_gpt2_are_not_taken_for_them(gpt: Any, corpus: Path) -> None:
    shaken(gpt2(1, 2, 16, vocab_size=50257)).save_pretrained("swapped")
    content = tokenizer_json(gpt2_tokenizer())
    ids = content["model"]["vocab"]
    ids["a"], ids["b"] = ids["b"], ids["a"]
    Path("swapped/tokenizer.json").write_text(json.dumps(content))
    assert gpt("prepare", str(corpus), "--out", "data/g2").code == 0
    train = ("train", "-s", "data.dir=data/g2", "-s", "model.init_from=swapped")
    for words in (("eval", "swapped", "--data", "data/g2"), train):
        done = gpt(*words)
        assert done.code == 2 and "2 of 50,257 ids mean something else" in done.err, done.err
        assert "tokenizer.name=gpt2" not in done.err and "eval swapped --text" in done.err


def test_a_tokenizer_that_changes_the_text_is_said(
    gpt: Any, theirs: Any, caplog: pytest.LogCaptureFixture
) -> None:
    file = Path("theirs/tokenizer.json")
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"normalizer": {"type": "Lowercase"}})
    )
    for text, is_changed in (("The cat sat.", True), ("the cat sat.", False)):
        Path("text.txt").write_text(text)
        done = gpt("eval", "theirs", "--text", "text.txt", *EXACT)
        assert done.code == 0 and ("changes this text" in done.err) == is_changed, done.err
        caplog.clear()
        evaluate("theirs", text="text.txt", device="cpu")
        assert ("changes this text" in caplog.text) == is_changed


# nanoGPT.


def save_characters(alphabet: str) -> NanoGPT:
    """Write a nanoGPT checkpoint of characters: exactly as many rows, no end-of-text."""
    torch.manual_seed(1)
    args = {"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 24, "bias": False,
            "vocab_size": len(alphabet), "dropout": 0.0}  # fmt: skip
    model = NanoGPT(args).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    content = {"model": model.state_dict(), "model_args": args, "iter_num": 7, "config": {}}
    torch.save(content, "ckpt.pt")
    return model


def test_characters_of_nanogpt_are_scored_as_nanogpt_does(gpt: Any, corpus: Path) -> None:
    alphabet = "".join(sorted(set(corpus.read_text())))
    model = save_characters(alphabet)
    chars = ("-s", "tokenizer.name=char", "-s", "tokenizer.path=corpus.txt")
    expected = plain_loss(model, [alphabet.index(char) for char in corpus.read_text()], 24)
    done = gpt("eval", "ckpt.pt", "--text", str(corpus), *chars, *EXACT)
    assert done.code == 0, done.err
    assert done.json["loss"] == pytest.approx(expected, abs=1e-6)
    trained = load_with_characters()
    ids = torch.tensor([[1, 5, 2]])
    assert trained.model(ids).logits.shape[-1] == len(alphabet)
    torch.testing.assert_close(trained.model(ids).logits, model(ids), rtol=0, atol=1e-5)
    drawn = gpt("generate", "--checkpoint", "ckpt.pt", "the", *chars, *SHORT)
    assert drawn.code == 0 and set(drawn.json["samples"][0]["text"]) <= set(alphabet)
    empty = gpt("generate", "--checkpoint", "ckpt.pt", *chars, *SHORT)
    assert empty.code == 2 and "give it a prompt" in empty.err


def load_with_characters() -> Any:
    """Load `ckpt.pt` with the characters of a data folder."""
    from gptcli import prepare
    from gptcli.config import load_config

    settings = ["data.source=corpus.txt", "data.dir=data/char", "tokenizer.name=char"]
    prepare(load_config(None, settings))
    return load("ckpt.pt", device="cpu", data="data/char")


def test_weights_without_tokens_ask_for_a_tokenizer(gpt: Any, corpus: Path) -> None:
    save_characters("".join(sorted(set(corpus.read_text()))))
    done = gpt("eval", "ckpt.pt", "--text", str(corpus))
    assert done.code == 2 and "-s tokenizer.name=char -s tokenizer.path=input.txt" in done.err
    done = gpt("eval", "ckpt.pt", "--text", str(corpus), "-s", "tokenizer.name=char")
    assert done.code == 2 and "tokenizer.path is missing" in done.err
    done = gpt("eval", "ckpt.pt", "--text", str(corpus), "-s", "tokenizer.name=gpt2")
    assert done.code == 2 and "too few for the 50,257 tokens" in done.err
    with pytest.raises(ConfigError, match="do not say what its"):
        load("ckpt.pt", device="cpu")


@pytest.mark.parametrize("kind", ["sparse", "meta", "complex", "int"])
def test_weights_of_nanogpt_that_are_no_plain_numbers_are_refused(
    gpt: Any, corpus: Path, kind: str
) -> None:
    save_characters("".join(sorted(set(corpus.read_text()))))
    content, name = torch.load("ckpt.pt"), "transformer.h.0.mlp.c_fc.weight"
    weight = content["model"][name]
    odd = {"sparse": weight.to_sparse(), "meta": weight.to("meta"),
           "complex": weight.to(torch.complex64), "int": weight.to(torch.int32)}  # fmt: skip
    content["model"][name] = odd[kind]
    torch.save(content, "ckpt.pt")
    chars = ("-s", "tokenizer.name=char", "-s", "tokenizer.path=corpus.txt")
    done = gpt("eval", "ckpt.pt", "--text", str(corpus), *chars)
    assert done.code == 4 and f"ckpt.pt: {name} is not a dense tensor" in done.err
    with pytest.raises(CheckpointError, match="is not a dense tensor"):
        open_pretrained("ckpt.pt")


def test_no_pickle_beside_a_checkpoint_is_opened(gpt: Any, corpus: Path) -> None:
    save_characters("".join(sorted(set(corpus.read_text()))))
    Path("meta.pkl").write_bytes(pickle.dumps(Trap()))
    assert gpt("eval", "ckpt.pt", "--text", str(corpus)).code == 2
    assert not Path("sprung").exists()


class Trap:
    """Leaves a file behind where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("sprung",)


def test_training_goes_on_from_characters_as_they_are(gpt: Any, corpus: Path) -> None:
    save_characters("".join(sorted(set(corpus.read_text()))))
    load_with_characters()
    sets = ("data.dir=data/char", "model.init_from=ckpt.pt", "train.max_steps=1", "device=cpu",
            "train.micro_batch_size=2", "train.eval_tokens=64", "compile=false")  # fmt: skip
    done = gpt("train", *(word for one in sets for word in ("-s", one)), "--json")
    assert done.code == 0, done.err


# The Hub, and what cannot be used.


def test_gpt2_of_the_hub_is_scored_and_talks(gpt_at: Gpt, corpus: Path) -> None:
    model = shaken(gpt2(1, 2, 16, vocab_size=50257))
    model.save_pretrained("saved")
    files = {path.name: path.read_bytes() for path in Path("saved").iterdir()}
    llama_files = dict(files)
    llama_files["tokenizer.json"] = json.dumps(tokenizer_json(gpt2_tokenizer())).encode()
    repositories = {"openai-community/gpt2": files, "me/mine": llama_files}
    with Hub(repositories) as hub:
        done = gpt_at(hub.url, "eval", "gpt2", "hf:me/mine", "--text", str(corpus), *EXACT)
    assert done.code == 0, done.err
    first, second = done.json["results"]
    assert (first["checkpoint"], second["checkpoint"]) == ("gpt2", "hf:me/mine")
    expected = plain_loss(model, gpt2_tokenizer().encode(corpus.read_text()).tolist(), 24)
    assert first["loss"] == pytest.approx(expected, abs=1e-5) and second["loss"] == first["loss"]
    # What is in the cache needs no network.
    done = gpt_at("http://127.0.0.1:9", "generate", "--checkpoint", "gpt2", "Hello", *SHORT)
    assert done.code == 0, done.err
    assert done.json["samples"][0]["tokens"] == 5


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("openai-community/gpt2", 4, "from the Hugging Face Hub: hf:openai-community/gpt2"),
        ("data/gpt2", 4, "or name gpt2, gpt2-medium"),
        ("template", 4, "template/tokenizer.json: the 'tokenizer.json' tokenizer fails: "),
        ("backtracking", 3, "the 'tokenizer.json' tokenizer fails: "),
        ("gtp2", 4, "runs here: none; or name gpt2, gpt2-medium"),
        ("empty", 4, "no config.json"),
        ("hf:gpt2", 4, "expected hf:org/name"),
        ("best.pt", 4, "best.pt: no such file here, and no run"),
        ("model.safetensors", 4, "name its folder"),
        ("sentencepiece", 4, "only ByteLevel and Fuse are supported"),
        ("damaged", 4, "tokenizer.json: "),
        ("too-many", 4, "its tokenizer has ids up to 4,294,967,291, the model 257 rows"),
    ],
)
def test_what_cannot_be_opened(gpt: Any, theirs: Any, name: str, code: int, says: str) -> None:
    Path("empty").mkdir()
    Path("model.safetensors").write_bytes(b"")
    for folder, change in (
        ("sentencepiece", {"decoder": {"type": "Metaspace", "replacement": "_",
                                       "prepend_scheme": "first", "split": True}}),
        ("damaged", {"model": {"type": "Unigram"}}),
        ("too-many", {"model": {"type": "WordLevel", "vocab": {"x": 4_294_967_290},
                                "unk_token": "x"}}),
        ("template", {"post_processor": {"type": "TemplateProcessing", "pair": [],
                                         "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
                                         "special_tokens": {}}}),
        ("backtracking", {"pre_tokenizer": {"type": "Split", "behavior": "Isolated",
                                            "pattern": {"Regex": "(x+x+)+y"}, "invert": False}}),
    ):  # fmt: skip
        shutil.copytree("theirs", folder)
        file = Path(folder, "tokenizer.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    done = gpt("generate", "--checkpoint", name, "x" * 8000)
    assert done.code == code and says in done.err and len(done.err_lines) <= 3, done.err
