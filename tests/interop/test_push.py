"""`gpt export --push`: the folder on the Hub, and back; a failure says how to repeat it."""

import json
from pathlib import Path

import pytest
import torch

from gptcli.checkpoint import load_checkpoint
from support.commands import Gpt
from support.hub import Hub
from support.runs import settings

WORDS = ("export", "--checkpoint", "tiny", "--to", "hf", "out", "--push", "me/tiny")


def test_what_is_pushed_can_be_started_from(run: Path, gpt_at: Gpt) -> None:
    with Hub({}) as hub:
        done = gpt_at(hub.url, *WORDS, "--json", HF_TOKEN="hf_secret")
        assert done.code == 0, (done.err, hub.requests)
        result = json.loads(done.out)
        assert result["address"].endswith("/me/tiny")
        assert "hf_secret" not in done.out + done.err
        assert hub.tokens == ["Bearer hf_secret"]
        back = gpt_at(hub.url, "generate", "--checkpoint", "hf:me/tiny", "The", "--json",
                      "-s", "dtype=float32", "--seed", "1", "--max-new-tokens", "8")  # fmt: skip
        assert back.code == 0, back.err
    ours = gpt_at(hub.url, "generate", "--checkpoint", "tiny", "The", "--json",
                  "-s", "dtype=float32", "--seed", "1", "--max-new-tokens", "8")  # fmt: skip
    assert json.loads(back.out)["samples"] == json.loads(ours.out)["samples"]


def test_a_run_starts_from_what_was_pushed(run: Path, gpt_at: Gpt) -> None:
    more = settings("model.init_from=hf:me/tiny", "train.max_steps=1", name="tuned")
    given = [word for word in more if not word.startswith("model.") or "init_from" in word]
    words = [part for word in given for part in ("-s", word)]
    with Hub({}) as hub:
        assert gpt_at(hub.url, *WORDS, HF_TOKEN="hf_secret").code == 0
        done = gpt_at(hub.url, "train", *words)
        assert done.code == 0, done.err
    ours = load_checkpoint(run / "best.pt").model
    begun = load_checkpoint(Path("runs/tuned/checkpoints/step-00000000.pt"))
    assert begun.state["origin"]["init_from"] == "hf:me/tiny"
    assert all(torch.equal(weight, begun.model[name]) for name, weight in ours.items())


def test_a_push_that_fails_leaves_the_folder_and_says_how_to_repeat_it(
    run: Path, gpt_at: Gpt
) -> None:
    with Hub({}, {"me/tiny": [403]}) as hub:
        done = gpt_at(hub.url, *WORDS, HF_TOKEN="hf_secret")
    assert done.code == 5
    assert "out is written but not pushed to me/tiny" in done.err
    assert "hf upload me/tiny out" in done.err
    assert "Traceback" not in done.err
    assert (Path("out") / "README.md").is_file()
    done = gpt_at("http://127.0.0.1:9", *WORDS, "--force", HF_TOKEN="hf_secret")
    assert (done.code, "no answer from 127.0.0.1" in done.err) == (5, True)


def test_a_gguf_file_comes_with_it_on_demand(run: Path, gpt_at: Gpt) -> None:
    with Hub({}) as hub:
        done = gpt_at(hub.url, *WORDS, "--gguf", HF_TOKEN="hf_secret")
        # bytes are no vocabulary that llama.cpp knows: refused before anything is written
        assert done.code == 2
        assert not Path("out").exists()
        assert hub.requests == []
        how = "tokenizer.name=bpe", "tokenizer.vocab_size=300"
        words = [part for word in how for part in ("-s", word)]
        assert gpt_at(hub.url, "prepare", "corpus.txt", "--out", "data/bpe", *words).code == 0
        given = settings("data.dir=data/bpe", "train.max_steps=1", "model.mlp=gelu_erf", name="bpe")
        words = [part for word in given if word != "data.dir=data/tiny" for part in ("-s", word)]
        assert gpt_at(hub.url, "train", *words).code == 0
        words = [word if word != "tiny" else "bpe" for word in WORDS]
        done = gpt_at(hub.url, *words, "--gguf", "--dtype", "q8_0", "--json", HF_TOKEN="hf_secret")
    assert done.code == 0, done.err
    assert done.json["gguf"] == "out/out.gguf" and "GELU" in done.json["notes"][-1]
    assert "PUT /large/" in "".join(hub.requests)
    assert hub.repositories["me/tiny"]["out.gguf"] == Path("out/out.gguf").read_bytes()
    assert hub.repositories["me/tiny"]["out.gguf"].startswith(b"GGUF")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--push", "tiny"), "org/name"),
        (("--push", "me/tiny..b"), "Cannot have -- or .."),
        (("--push", "mé/tiny"), "alphanumeric"),
        (("--push", "me/tiny.git"), "cannot"),
        (("--push", "me/../tiny"), "org/name"),
        (("--push", "me/tiny"), "HF_TOKEN"),
    ],
)
def test_a_push_that_cannot_work_is_refused_before_any_work(
    run: Path, gpt_at: Gpt, words: tuple[str, ...], says: str
) -> None:
    done = gpt_at(
        "http://127.0.0.1:9", "export", "--checkpoint", "tiny", "--to", "hf", "out", *words
    )
    assert (done.code, says in done.err) == (2, True)
    assert not Path("out").exists()
