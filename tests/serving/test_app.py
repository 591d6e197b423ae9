"""The server as a client sees it: answers, streams, and the texts of `gpt generate`."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from gptcli.api.generate import Sampler
from gptcli.config import load_config
from support.serving import Served, serving


@pytest.fixture(scope="module")
def server(finished_run: Path) -> Iterator[Served]:
    """A server of the tiny run."""
    with serving(str(finished_run)) as served:
        yield served


def generated(run: Path, **settings: object) -> list[str]:
    """Return what `gpt generate` draws."""
    flags = {key if key == "seed" else f"generate.{key}": value for key, value in settings.items()}
    flags |= {"device": "cpu", "dtype": "float32"}
    sampler = Sampler(str(run), lambda stored: load_config(None, (), flags, stored))
    texts: dict[int, str] = {}
    for sample, text in sampler.samples():
        texts[sample.index] = texts.get(sample.index, "") + text
    return list(texts.values())


def test_the_models_are_listed_with_what_the_page_shows(server: Served) -> None:
    status, body = server.json("/v1/models")
    assert (status, body["object"]) == (200, "list")
    [model] = body["data"]
    assert (model["id"], model["object"]) == ("tiny", "model")
    assert model["gptcli"]["context"] == 16
    assert model["gptcli"]["chat"] is False
    assert model["gptcli"]["steps"] == [3, 6]


def test_a_completion_is_what_generate_draws(server: Served, finished_run: Path) -> None:
    body = {"model": "tiny", "prompt": "The", "seed": 3, "max_tokens": 12, "temperature": 1.3}
    status, answer = server.json("/v1/completions", body | {"n": 3})
    assert status == 200
    expected = generated(
        finished_run, prompt="The", seed=3, max_new_tokens=12, temperature=1.3, num_samples=3
    )
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert {choice["finish_reason"] for choice in answer["choices"]} <= {"stop", "length"}
    assert answer["usage"]["prompt_tokens"] == 3


def test_a_stream_says_the_same_in_pieces(server: Served) -> None:
    body = {"model": "tiny", "prompt": "The", "seed": 3, "max_tokens": 30}
    _, whole = server.json("/v1/completions", body)
    events = server.events("/v1/completions", body | {"stream_options": {"include_usage": True}})
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole["usage"]
    pieces = [event["choices"][0] for event in events[:-1]]
    assert "".join(piece["text"] for piece in pieces) == whole["choices"][0]["text"]
    assert pieces[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]
