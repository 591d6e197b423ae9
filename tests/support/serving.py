"""A server of tiny runs in this process, and a client that speaks plain HTTP to it."""

import asyncio
import contextlib
import http.client
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gptcli.config import load_config


@dataclass
class Served:
    """A running server.

    Attributes:
        port: On 127.0.0.1.
        engine: What decodes.
        models: What it offers.
    """

    port: int
    engine: Any
    models: Any

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self,
        path: str,
        body: Any = None,
        method: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body of an answer; a body that is no bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        with contextlib.closing(connection):
            if body is not None and not isinstance(body, bytes):
                body = json.dumps(body).encode()
            always = {"Content-Type": "application/json"} if body is not None else {}
            method = method or ("GET" if body is None else "POST")
            connection.request(method, path, body, always | (headers or {}))
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, found, answer.read()

    def json(self, path: str, body: Any = None, **how: Any) -> tuple[int, Any]:
        """Return status and body of an answer that is JSON."""
        status, _, content = self.ask(path, body, **how)
        return status, json.loads(content)

    def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """Return the events of a stream, the last of which says that it is done."""
        _, headers, content = self.ask(path, body | {"stream": True})
        assert headers["content-type"].startswith("text/event-stream"), content
        lines = content.decode().split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


@contextlib.contextmanager
def serving(
    *names: str | None,
    settings: Sequence[str] = ("device=cpu", "dtype=float32"),
    keys: Sequence[str] = (),
    max_texts: int = 8,
    max_waiting: int = 64,
    seconds: float = 600,
    max_bytes: int = 1 << 30,
    idle_seconds: int = 30,
) -> Iterator[Served]:
    """Serve runs while the block runs."""
    import uvicorn

    from gptcli.serving.app import LOOPBACK, App, Limits
    from gptcli.serving.engine import Engine
    from gptcli.serving.models import Models
    from gptcli.serving.server import bind, uvicorn_config

    def of_run(run: dict[str, Any] | None) -> Any:
        return load_config(None, list(settings), {}, run)

    models = Models(names or [None], of_run, int8=False, max_bytes=max_bytes)
    engine = Engine(max_texts=max_texts, max_waiting=max_waiting)
    app = App(engine, models, Limits(keys, None if keys else LOOPBACK, seconds))
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    server = uvicorn.Server(uvicorn_config(app, idle_seconds))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    try:
        yield Served(port, engine, models)
    finally:
        server.should_exit = True
        engine.end_all()
        thread.join(20)
        engine.close()
