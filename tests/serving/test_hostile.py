"""What no client should send: each is refused in OpenAI's form, and nothing else is affected."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.serving import Served, serving

WHERE = "/v1/completions"
GOOD: dict[str, Any] = {"model": "tiny", "prompt": "The", "max_tokens": 3, "seed": 1}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture(scope="module")
def server(finished_run: Path) -> Iterator[Served]:
    """A server of the tiny run."""
    with serving(str(finished_run)) as served:
        yield served


@pytest.fixture(scope="module")
def expected(server: Served) -> Any:
    """What a good request is answered."""
    return server.json(WHERE, GOOD)[1]["choices"]


VALUES: dict[str, tuple[dict[str, Any], str | None]] = {
    "no such model": ({"model": "other"}, "model"),
    "a path for a model": ({"model": "../../etc/passwd"}, "model"),
    "a step that is no number": ({"model": "tiny@../6"}, "model"),
    "a step that is not kept": ({"model": "tiny@5"}, "model"),
    "a step of many digits": ({"model": "tiny@" + "9" * 5000}, "model"),
    "a step with zeros before it": ({"model": "tiny@00000006"}, "model"),
    "a step in other digits": ({"model": "tiny@٦"}, "model"),
    "a model that is a number": ({"model": 5}, "model"),
    "an unknown key": ({"max_new_tokens": 5}, "max_new_tokens"),
    "too many texts": ({"n": 65}, "n"),
    "too many texts in all": ({"n": 40, "prompt": ["a", "b"]}, "n"),
    "no texts": ({"n": 0}, "n"),
    "half a text": ({"n": 1.5}, "n"),
    "a number as text": ({"n": "1"}, "n"),
    "no tokens": ({"max_tokens": 0}, "max_tokens"),
    "a billion tokens": ({"max_tokens": 10**9}, "max_tokens"),
    "a negative temperature": ({"temperature": -1}, "temperature"),
    "a huge temperature": ({"temperature": 1e300}, "temperature"),
    "a temperature that is true": ({"temperature": True}, "temperature"),
    "nothing likely enough": ({"top_p": 0}, "top_p"),
    "more than everything": ({"top_p": 1.1}, "top_p"),
    "min_p above 1": ({"min_p": 2}, "min_p"),
    "too many stops": ({"stop": ["x"] * 17}, "stop"),
    "an empty stop": ({"stop": ""}, "stop"),
    "an empty stop in a list": ({"stop": ["a", ""]}, "stop"),
    "a long stop": ({"stop": "x" * 1001}, "stop"),
    "a long prompt": ({"prompt": "word " * 100}, "prompt"),
    "a token that is not there": ({"prompt": [999999]}, "prompt"),
    "a negative token": ({"prompt": [-1]}, "prompt"),
    "tokens beyond any": ({"prompt": [10**30]}, "prompt"),
    "tokens and texts mixed": ({"prompt": [1, "a"]}, "prompt"),
    "no token of the prompt": ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    "a prompt that is an object": ({"prompt": {"a": 1}}, "prompt"),
    "too many alternatives": ({"logprobs": 21}, "logprobs"),
    "a seed beyond 64 bits": ({"seed": 1 << 64}, "seed"),
    "echo": ({"echo": True}, "echo"),
    "a suffix": ({"suffix": "end"}, "suffix"),
    "the best of several": ({"best_of": 3}, "best_of"),
    "a frequency penalty": ({"frequency_penalty": 0.5}, "frequency_penalty"),
    "biased logits": ({"logit_bias": {"5": 100}}, "logit_bias"),
    "options of no stream": ({"stream_options": {"include_usage": True}}, "stream_options"),
    "unknown options of a stream": ({"stream": True, "stream_options": {"x": 1}}, None),
}  # fmt: skip


@pytest.mark.parametrize("name", VALUES)
def test_a_value_that_is_not_allowed_is_refused_by_name(
    server: Served, expected: Any, name: str
) -> None:
    change, key = VALUES[name]
    status, answer = server.json(WHERE, GOOD | change)
    assert status == (404 if key == "model" and isinstance(change["model"], str) else 400)
    assert set(answer) == {"error"}
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error"
    assert key is None or answer["error"]["param"] == key
    assert len(answer["error"]["message"]) < 600
    assert server.json(WHERE, GOOD)[1]["choices"] == expected


BODIES = {
    "nothing": b"",
    "no JSON": b"model=tiny&prompt=The",
    "half an object": b'{"model": "tiny", "prompt": "The',
    "a list": b"[]",
    "null": b"null",
    "bad UTF-8": b'{"model": "tiny", "prompt": "\xff\xfe"}',
    "half a surrogate pair": b'{"model": "tiny", "prompt": "\\ud800"}',
    "not a number": b'{"model": "tiny", "temperature": NaN}',
    "infinity": b'{"model": "tiny", "temperature": Infinity}',
    "deep lists": b'{"model": "tiny", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "a number of many digits": b'{"model": "tiny", "seed": ' + b"9" * 100_000 + b"}",
    "two values": b'{"model": "tiny"} {"model": "tiny"}',
    "zero bytes": b"\0" * 1000,
    "no model": b'{"prompt": "The"}',
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_that_is_no_request_is_refused(server: Served, expected: Any, name: str) -> None:
    for path in (WHERE, "/v1/chat/completions"):
        status, answer = server.json(path, BODIES[name])
        assert (status, set(answer)) == (400, {"error"}), answer
        assert len(answer["error"]["message"]) < 600
    assert server.json(WHERE, GOOD)[1]["choices"] == expected


HEADERS: dict[str, tuple[dict[str, str], int]] = {
    "another site": ({"Origin": "http://evil.example"}, 403),
    "a page in a sandbox": ({"Origin": "null"}, 403),
    "another port": ({"Origin": "http://127.0.0.1:1"}, 403),
    "a name that points here": ({"Host": "evil.example"}, 403),
    "a name like ours": ({"Host": "localhost.evil.example"}, 403),
    "a host of two": ({"Host": "localhost, evil.example"}, 403),
    "a script of another site": ({"Sec-Fetch-Site": "cross-site"}, 403),
    "a form": ({"Content-Type": "application/x-www-form-urlencoded"}, 415),
    "plain text": ({"Content-Type": "text/plain"}, 415),
    "a length below zero": ({"Content-Length": "-1"}, 400),
    "a length of words": ({"Content-Length": "many"}, 400),
    "a long header": ({"X-Long": "x" * 100_000}, 431),
    "a header of two lines": ({"X-Two": "a\x00b"}, 400),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_no_client_of_ours_sends_are_refused(
    server: Served, expected: Any, name: str
) -> None:
    headers, status = HEADERS[name]
    found, answer = raw(server, "POST", WHERE, headers, json.dumps(GOOD).encode())
    assert (found, set(answer)) == (status, {"error"})
    assert server.json(WHERE, GOOD)[1]["choices"] == expected


def raw(
    server: Served, method: str, path: str, headers: dict[str, str], body: bytes = b""
) -> tuple[int, Any]:
    """Send a request as bytes, which http.client would correct."""
    always = {"Host": f"127.0.0.1:{server.port}", "Content-Type": "application/json",
              "Content-Length": str(len(body)), "Connection": "close"}  # fmt: skip
    lines = [f"{method} {path} HTTP/1.1", *(f"{k}: {v}" for k, v in (always | headers).items())]
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1") + body)
        return read_answer(connection)


def read_answer(connection: socket.socket) -> tuple[int, Any]:
    """Read an answer to its end."""
    answer = b""
    while part := connection.recv(65536):
        answer += part
    head, _, content = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(content)


PATHS = ("/v2/completions", "/v1/completions/", "/v1/../v1/models/..", "/..%2f..%2fetc/passwd",
         "//evil.example/", "/page.html", "/v1/models/..%2f..%2fetc%2fpasswd", "/v1/models/",
         "/v1/gptcli/samples?model=../../etc", "/v1/gptcli/samples", "/%00", "/\xe9")  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_an_address_that_leads_nowhere_is_not_found(server: Served, path: str) -> None:
    status, answer = raw(server, "GET", path, {})
    assert (status, set(answer)) in ((404, {"error"}), (400, {"error"}))


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_a_method_that_is_not_for_the_address_is_refused(server: Served, method: str) -> None:
    status, answer = raw(server, method, WHERE, {})
    assert (status, set(answer)) == (405, {"error"})


LINES = {
    "no HTTP": b"hello\r\n\r\n",
    "another protocol": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100,
    "no host": b"GET /v1/models HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
    "a version to come": b"GET /v1/models HTTP/9.9\r\nHost: localhost\r\n\r\n",
    "two lengths": b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\n"
    b"Content-Length: 2\r\n\r\nab",
    "a space in a name": b"GET /v1/models HTTP/1.1\r\nHost : localhost\r\n\r\n",
    "no host by an old client": b"GET /v1/models HTTP/1.0\r\n\r\n",
}


@pytest.mark.parametrize("name", LINES)
def test_bytes_that_are_no_request_are_answered_in_the_same_form(
    server: Served, expected: Any, name: str
) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(LINES[name])
        status, answer = read_answer(connection)
    assert (status in (400, 403), set(answer)) == (True, {"error"})
    assert server.json(WHERE, GOOD)[1]["choices"] == expected


@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_beyond_the_limit_is_refused_before_it_is_read(
    server: Served, is_chunked: bool
) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    how = b"Transfer-Encoding: chunked" if is_chunked else b"Content-Length: 99999999999"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(head + how + b"\r\n\r\n")
        if is_chunked:
            for _ in range(17):
                connection.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        status, answer = read_answer(connection)
    assert (status, set(answer)) == (413, {"error"})


def test_a_base_model_does_not_chat(server: Served) -> None:
    status, answer = server.json("/v1/chat/completions", CHAT)
    assert (status, answer["error"]["param"]) == (400, "model")
    assert "base model" in answer["error"]["message"]


def test_a_message_without_content_is_named(server: Served) -> None:
    status, answer = server.json("/v1/chat/completions", CHAT | {"messages": [{"role": "user"}]})
    assert (status, answer["error"]["message"]) == (400, "missing parameter: messages.0.content")


def test_two_limits_of_an_answer_are_one_too_many(server: Served) -> None:
    limits = {"max_tokens": 5, "max_completion_tokens": 6}
    status, answer = server.json("/v1/chat/completions", CHAT | limits)
    assert (status, answer["error"]["param"]) == (400, "max_tokens")


def test_a_server_with_keys_opens_to_them_only(finished_run: Path) -> None:
    with serving(str(finished_run), keys=("first", "second", "schlüssel")) as server:
        for path in ("/v1/models", "/metrics", "/v1/gptcli/samples?model=tiny"):
            assert server.json(path)[0] == 401
        for wrong in ("Bearer third", "Bearer", "Basic second", "Bearer \xff", "second"):
            status, answer = server.json(WHERE, GOOD, headers={"Authorization": wrong})
            assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        headers = {"Authorization": "Bearer second", "Host": "model.example"}
        assert server.json(WHERE, GOOD, headers=headers)[0] == 200
        headers |= {"Authorization": "Bearer " + "schlüssel".encode().decode("latin-1")}
        assert server.json(WHERE, GOOD, headers=headers)[0] == 200
        assert server.ask("/healthz")[0] == 200
