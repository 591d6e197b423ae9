"""Clients that people use, unchanged, and the commands of docs/serve.md."""

import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.chat import parrot
from support.serving import Served, serving

openai = pytest.importorskip("openai")
DOCUMENT = Path(__file__).parents[2] / "docs" / "serve.md"


@pytest.fixture(scope="module")
def server(finished_run: Path) -> Iterator[Served]:
    """A server of the tiny run."""
    with serving(str(finished_run)) as served:
        yield served


def client_of(server: Served) -> "openai.OpenAI":
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_openai_completes_at_once_and_in_a_stream(server: Served) -> None:
    with client_of(server) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        how = {"model": "tiny", "prompt": "The", "max_tokens": 20, "seed": 5, "logprobs": 2}
        whole = client.completions.create(**how, n=2)
        assert [choice.index for choice in whole.choices] == [0, 1]
        n_tokens = sum(len(choice.logprobs.tokens) for choice in whole.choices)
        assert n_tokens == whole.usage.completion_tokens
        stream = client.completions.create(
            **how, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        text = "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].text
        assert chunks[-1].usage.completion_tokens == 20
        with pytest.raises(openai.BadRequestError, match="base model"):
            client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "Hello"}]
            )
        with pytest.raises(openai.NotFoundError, match="no model"):
            client.completions.create(model="other", prompt="The")


def test_openai_asks_many_things_at_once(server: Served) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

            async def one(seed: int) -> str:
                parts = await client.completions.create(
                    model="tiny", prompt="The", max_tokens=20, seed=seed, stream=True
                )
                return "".join([part.choices[0].text async for part in parts])

            return await asyncio.gather(*map(one, range(20)))

    together = asyncio.run(ask())
    with client_of(server) as client:
        for seed, text in enumerate(together):
            alone = client.completions.create(model="tiny", prompt="The", max_tokens=20, seed=seed)
            assert alone.choices[0].text == text


def test_openai_chats_with_a_model_of_conversations() -> None:
    with (
        serving(str(parrot("Hi. ")), settings=["device=cpu"]) as server,
        client_of(server) as client,
    ):
        messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
        answer = client.chat.completions.create(
            model="x", messages=messages, logprobs=True, top_logprobs=2, max_completion_tokens=9
        )
        assert answer.choices[0].message.content == "Hi. "
        assert answer.choices[0].finish_reason == "stop"
        assert [one.token for one in answer.choices[0].logprobs.content] == list("Hi. ")
        chunks = list(client.chat.completions.create(model="x", messages=messages, stream=True))
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hi. "
        assert chunks[-1].choices[0].finish_reason == "stop"
        with pytest.raises(openai.BadRequestError, match="shorten the text"):
            client.chat.completions.create(
                model="x", messages=[{"role": "user", "content": "word " * 50}]
            )


def blocks(kind: str) -> list[str]:
    """Return the code of one language in the document."""
    return re.findall(rf"^```{kind}\n(.*?)^```", DOCUMENT.read_text("utf-8"), re.DOTALL | re.M)


def here(code: str, server: Served) -> str:
    """Let a command of the document speak to the server of the test."""
    return code.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}").replace("quickstart", "tiny")


def test_the_document_s_commands_do_what_it_says(server: Served, tmp_path: Path) -> None:
    if shutil.which("curl") is None or shutil.which("bash") is None:
        pytest.skip("no curl here")
    pytest.importorskip("llm")
    [lines] = blocks("yml")
    (tmp_path / "extra-openai-models.yaml").write_text(here(lines, server))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    env |= {"LLM_USER_PATH": str(tmp_path), "PATH": path}
    env.pop("OPENAI_API_KEY", None)
    curl, llm = (here(code, server) for code in blocks("bash"))
    for code, says in ((curl, '"finish_reason": "'), (llm, "")):
        done = subprocess.run(
            ["bash", "-ec", code], env=env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() and says in done.stdout


def test_the_document_s_program_prints_a_text(
    server: Served, capsys: pytest.CaptureFixture[str]
) -> None:
    [code] = blocks("python")
    exec(compile(here(code, server), "docs/serve.md", "exec"), {})
    assert capsys.readouterr().out
