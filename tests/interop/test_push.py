"""`gpt export --push`: the folder on the Hub, and back; a failure says how to repeat it."""

import json
from pathlib import Path

import pytest

from support.commands import Gpt
from support.hub import Hub

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


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--push", "tiny"), "org/name"),
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
