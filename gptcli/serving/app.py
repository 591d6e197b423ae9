"""The routes of the server, and what they refuse; an ASGI application.

The text of a prompt is never logged.
"""

import asyncio
import contextlib
import hmac
import json
import logging
import re
import time
import traceback
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from gptcli.errors import GptError, MemoryLimitError
from gptcli.serving.api import (
    MAX_BODY,
    ApiError,
    ChatRequest,
    CompletionRequest,
    Wanted,
    choice,
    head,
    parse,
    usage,
    wanted,
)
from gptcli.serving.engine import Busy, Engine, Job, make_texts
from gptcli.serving.metrics import Metrics
from gptcli.serving.models import Model, Models, history_of
from gptcli.serving.page import page

_log = logging.getLogger("gptcli")
_UPLOAD_SECONDS = 30.0
_SHORT = 1 << 13  # bytes of a body that is encoded in less time than a thread takes to begin
_MAX_HEADERS = 1 << 15  # bytes
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


@dataclass
class Reply:
    """A whole answer."""

    body: bytes
    status: int = 200
    kind: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Limits:
    """What keeps a server usable.

    Attributes:
        keys: Any of them opens it; without keys, none is needed.
        hosts: Names that it may be called by; None is any.
        seconds: The most that a request may take.
    """

    keys: Sequence[str] = ()
    hosts: Sequence[str] | None = LOOPBACK
    seconds: float = 600.0


@dataclass
class Call:
    """One request over HTTP."""

    version: str
    method: str
    path: str
    query: str
    headers: dict[str, str]
    receive: Receive
    send: Send
    status: int = 0  # once an answer has begun
    n_tokens: int | None = None


class App:
    """Answers requests."""

    def __init__(self, engine: Engine, models: Models, limits: Limits) -> None:
        self._engine, self._models, self._limits = engine, models, limits
        self._metrics = Metrics()
        self._routes: dict[str, tuple[str, Callable[[Call], Awaitable[Reply | None]]]] = {
            "/": ("GET", self._get_page),
            "/healthz": ("GET", self._health),
            "/metrics": ("GET", self._get_metrics),
            "/v1/models": ("GET", self._list_models),
            "/v1/gptcli/samples": ("GET", self._samples),
            "/v1/completions": ("POST", partial(self._generate, CompletionRequest)),
            "/v1/chat/completions": ("POST", partial(self._generate, ChatRequest)),
        }

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        headers = {}
        for name, value in scope["headers"]:
            headers[name.decode("latin-1")] = value.decode("latin-1")
        version, method, path = (scope[name] for name in ("http_version", "method", "path"))
        query = scope["query_string"].decode("latin-1")
        call = Call(version, method, path, query, headers, receive, send)
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._limits.seconds + _UPLOAD_SECONDS):
                reply = await self._answer(call)
                if reply is not None:
                    await _send(call, reply)
        finally:  # also where a client reads too slowly: uvicorn then closes its connection
            route, seconds = call.path if call.path in self._routes else "other", time.monotonic()
            self._metrics.count(route, call.status, seconds - began)
            if call.n_tokens is not None or call.status >= 400:
                n_tokens = call.n_tokens or 0
                _log.info(f"{route} {call.status}: {n_tokens} tokens in {seconds - began:.2f} s")

    async def _answer(self, call: Call) -> Reply | None:
        """Return the answer, an error too; None for one that was streamed."""
        try:
            return await self._route(call)
        except Exception as error:
            if call.status:  # has begun
                raise
            failure = _as_failure(error, is_ending=self._engine.is_draining)
            return Reply(json.dumps(failure.body).encode(), failure.status, headers=failure.headers)

    async def _route(self, call: Call) -> Reply | None:
        if sum(len(name) + len(value) for name, value in call.headers.items()) > _MAX_HEADERS:
            raise ApiError(431, "the headers are too long", headers={"connection": "close"})
        if call.version not in ("1.0", "1.1"):
            raise ApiError(400, "use HTTP/1.1", headers={"connection": "close"})
        self._require_same_site(call)
        method, handler = self._routes.get(call.path, ("", self._get_page))
        if not method and call.path.startswith("/v1/models/"):
            method, handler = "GET", self._get_model
        if not method:
            raise ApiError(404, "no such address; the API is under /v1", code="not_found")
        if call.method != method and not (call.method == "HEAD" and method == "GET"):
            raise ApiError(
                405,
                f"use {method} for this address",
                headers={"allow": method, "connection": "close"},
            )
        if call.path not in ("/", "/healthz"):
            self._require_key(call)
        return await handler(call)

    def _require_same_site(self, call: Call) -> None:
        """Refuse what a page of another site, or a name that it made point here, sends."""
        host = call.headers.get("host", "")
        name = re.sub(r":\d{1,5}$", "", host.lower())
        if self._limits.hosts is not None and name not in self._limits.hosts:
            raise ApiError(403, "the Host header names another server", code="forbidden_host")
        origin = call.headers.get("origin")
        is_other = origin is not None and origin.lower() not in (
            f"http://{host.lower()}",
            f"https://{host.lower()}",
        )
        site = call.headers.get("sec-fetch-site", "none")
        is_page = call.path == "/" and call.headers.get("sec-fetch-mode") == "navigate"
        if is_other or (site not in ("none", "same-origin") and not is_page):
            raise ApiError(403, "pages of other sites may not use this", code="forbidden_origin")

    def _require_key(self, call: Call) -> None:
        if not self._limits.keys:
            return
        scheme, _, given = call.headers.get("authorization", "").partition(" ")
        known = [hmac.compare_digest(given.strip().encode("latin-1"), key.encode())
                 for key in self._limits.keys]  # fmt: skip
        if scheme.lower() != "bearer" or not any(known):
            raise ApiError(
                401, "a valid API key is needed: Authorization: Bearer KEY",
                code="invalid_api_key", headers={"www-authenticate": "Bearer"},
            )  # fmt: skip

    async def _get_page(self, call: Call) -> Reply:
        body, headers = page()
        return Reply(body, headers={name.lower(): value for name, value in headers.items()})

    async def _health(self, call: Call) -> Reply:
        is_ending = self._engine.is_draining
        return _json({"status": "ending" if is_ending else "ok"}, 503 if is_ending else 200)

    async def _get_metrics(self, call: Call) -> Reply:
        text = self._metrics.text(self._engine)
        return Reply(text.encode(), kind="text/plain; version=0.0.4; charset=utf-8")

    async def _list_models(self, call: Call) -> Reply:
        models = [_described(model) for model in self._models.served.values()]
        return _json({"object": "list", "data": models})

    async def _get_model(self, call: Call) -> Reply:
        model = await self._use(call.path.removeprefix("/v1/models/"))
        try:
            return _json(_described(model))
        finally:
            self._models.done(model)

    async def _samples(self, call: Call) -> Reply:
        [id] = urllib.parse.parse_qs(call.query).get("model", [""])[:1]
        model = self._models.served.get(id)
        if model is None:
            raise ApiError(404, f"no model {id[:100]!r}", param="model", code="model_not_found")
        history = await asyncio.to_thread(history_of, model.trained)
        return _json({"object": "list", "data": [row.model_dump() for row in history.samples]})

    async def _generate(
        self, kind: type[CompletionRequest] | type[ChatRequest], call: Call
    ) -> Reply | None:
        body = await _body(call)
        request = parse(body, kind)
        model = await self._use(request.model)
        try:
            if len(body) < _SHORT:
                asked = wanted(request, model)
            else:  # which takes a while
                asked = await asyncio.to_thread(wanted, request, model)
            texts = make_texts(
                model, asked.prompts, asked.config,
                n=asked.n, seed=asked.seed, n_top=asked.n_top,
            )  # fmt: skip
            if len(texts) > (most := self._engine.most_texts):
                raise ApiError(400, f"n: this server takes at most {most} texts", param="n")
            now, loop = time.monotonic(), asyncio.get_running_loop()
            job = Job(model, texts, now + self._limits.seconds, asked.is_streamed, loop)
            self._engine.submit(job)
            watch = asyncio.create_task(self._watch(call, job))
            try:
                if asked.is_streamed:
                    await self._stream(call, asked, job)
                    return None
                return await self._whole(asked, job)
            finally:
                watch.cancel()
                self._engine.cancel(job)
                call.n_tokens = job.n_tokens
                self._metrics.finish(job, now, sum(map(len, asked.prompts)))
        finally:
            self._models.done(model)

    async def _watch(self, call: Call, job: Job) -> None:
        """Free the places of a request whose client hangs up."""
        while (await call.receive())["type"] != "http.disconnect":
            pass
        self._engine.cancel(job)
        job.error = ConnectionAbortedError()
        job.changed.set()

    async def _whole(self, asked: Wanted, job: Job) -> Reply:
        try:  # each text comes as one piece, complete
            found = [piece async for some in self._engine.pieces(job) for piece in some]
        except ConnectionAbortedError:
            return Reply(b"", 499)
        found.sort(key=lambda piece: piece.index)
        choices = [choice(asked, piece, job.model, is_chunk=False) for piece in found]
        answer = head(asked, job.model, is_chunk=False) | {"choices": choices}
        return _json(answer | {"usage": usage(asked, job.n_tokens)})

    async def _stream(self, call: Call, asked: Wanted, job: Job) -> None:
        """Send the texts as they grow, as server-sent events."""
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        await _begin(call, 200, "text/event-stream; charset=utf-8", headers)
        try:
            async for event in self._events(asked, job):
                line = event if isinstance(event, str) else json.dumps(event)
                await _send_part(call, f"data: {line}\n\n".encode())
        except ConnectionAbortedError:
            return
        except Exception as error:
            body = json.dumps(_as_failure(error, is_ending=False).body)
            await _send_part(call, f"data: {body}\n\n".encode())
        await _send_part(call, b"", is_last=True)

    async def _events(self, asked: Wanted, job: Job) -> AsyncIterator[dict[str, Any] | str]:
        start, nothing = head(asked, job.model, is_chunk=True), dict[str, Any]()
        if asked.has_usage:
            nothing = {"usage": None}
        async for pieces in self._engine.pieces(job):
            for piece in pieces:
                found = choice(asked, piece, job.model, is_chunk=True)
                yield start | {"choices": [found]} | nothing
        if asked.has_usage:
            yield start | {"choices": [], "usage": usage(asked, job.n_tokens)}
        yield "[DONE]"

    async def _use(self, id: str) -> Model:
        try:
            return await self._models.use(id)
        except KeyError:
            known = ", ".join(self._models.served)[:300]
            raise ApiError(
                404, f"no model {id[:100]!r}; available: {known}",
                param="model", code="model_not_found",
            ) from None  # fmt: skip
        except MemoryLimitError as error:
            raise ApiError(503, error.message, param="model") from None
        except GptError as error:  # which names a file of this machine
            _log.warning(error.message)
            message = f"{id} cannot be opened; the server's log says why"
            raise ApiError(503, message, param="model") from None


async def _body(call: Call) -> bytes:
    """Return the body of a request.

    Raises:
        ApiError: It is too large, too slow, or not said to be JSON.
    """
    kind = call.headers.get("content-type", "").partition(";")[0].strip().lower()
    close = {"connection": "close"}
    if kind != "application/json":
        raise ApiError(415, "the body must be JSON: Content-Type: application/json", headers=close)
    parts, n_bytes = [], int(call.headers.get("content-length") or 0)
    try:
        async with asyncio.timeout(_UPLOAD_SECONDS):
            while n_bytes <= MAX_BODY:
                message = await call.receive()
                if message["type"] == "http.disconnect":
                    raise ApiError(400, "the body ended early")
                parts.append(message.get("body", b""))
                if not message.get("more_body"):
                    return b"".join(parts)
                n_bytes = max(n_bytes, sum(map(len, parts)))
    except TimeoutError:
        raise ApiError(408, "the body came too slowly", headers=close) from None
    # Closing while more arrives would reset the connection before the client has read why.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1):
            while (await call.receive()).get("more_body"):
                pass
    raise ApiError(413, f"the body is larger than {MAX_BODY} bytes", headers=close)


def _described(model: Model) -> dict[str, Any]:
    return {"id": model.id, "object": "model", "created": 0, "owned_by": "gptcli",
            "gptcli": model.facts()}  # fmt: skip


def _json(value: dict[str, Any], status: int = 200) -> Reply:
    return Reply(json.dumps(value).encode(), status)


def _as_failure(error: Exception, *, is_ending: bool) -> ApiError:
    """Return what a client is answered instead of an error of ours."""
    match error:
        case ApiError():
            return error
        case Busy():
            word, wait = "ending" if is_ending else "busy", str(error.seconds)
            return ApiError(
                503 if is_ending else 429, f"the server is {word}: try again in {wait} s",
                code="overloaded", headers={"retry-after": wait},
            )  # fmt: skip
        case GptError():
            return ApiError(500, error.message)
    _log.warning("".join(traceback.format_exception(error)))
    return ApiError(500, "an error in the server; its log says more")


async def _send(call: Call, reply: Reply) -> None:
    length = {"content-length": str(len(reply.body))}
    await _begin(call, reply.status, reply.kind, length | reply.headers)
    await _send_part(call, reply.body, is_last=True)


async def _begin(call: Call, status: int, kind: str, headers: dict[str, str]) -> None:
    always = {
        "content-type": kind,
        "x-content-type-options": "nosniff",
        "cross-origin-resource-policy": "same-origin",
        "referrer-policy": "no-referrer",
    }
    pairs = [(name.encode(), value.encode("latin-1", "replace"))
             for name, value in (always | headers).items()]  # fmt: skip
    call.status = status
    await call.send({"type": "http.response.start", "status": status, "headers": pairs})


async def _send_part(call: Call, body: bytes, *, is_last: bool = False) -> None:
    await call.send({"type": "http.response.body", "body": body, "more_body": not is_last})
