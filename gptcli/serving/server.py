"""The process of a server: its socket, its signals, and how it ends."""

import asyncio
import contextlib
import errno
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from gptcli.errors import EXIT_INTERRUPTED, ConfigError
from gptcli.serving.api import ApiError
from gptcli.serving.app import App
from gptcli.serving.engine import Engine

_BACKLOG = 512  # connections that wait to be accepted


class Protocol(H11Protocol):
    """HTTP; other bytes are answered in OpenAI's form, and a connection without a request ends."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request, but not for longer than for the next one."""
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def data_received(self, data: bytes) -> None:
        """Read more; the wait is over when the head of a request is complete."""
        timer, self.timeout_keep_alive_task = self.timeout_keep_alive_task, None
        super().data_received(data)
        is_waiting = self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is None
        if timer is not None and is_waiting:
            self.timeout_keep_alive_task = timer
        elif timer is not None:
            timer.cancel()

    def send_400_response(self, msg: str) -> None:
        """Answer bytes that are no request."""
        body = json.dumps(ApiError(400, f"not a request over HTTP/1.1: {msg}").body).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))),
                   ("connection", "close")]  # fmt: skip
        with contextlib.suppress(h11.LocalProtocolError):
            for event in (
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `serve`."""
        yield


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
        ConfigError: The port is in use, or the host is not one of this machine.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
        *kind, _, address = found[0]
        listener = socket.socket(*kind)  # its protocol named, or asyncio leaves Nagle's delay on
        try:
            if os.name == "posix":
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)  # until then, others could bind to the same port
        except OSError:
            listener.close()
            raise
    except OSError as error:
        hint = "use an address of this machine, for example --host 127.0.0.1"
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            hint = "use another: --port "
            hint += f"{port + 1}, or --port 0 for a free one" if 1023 < port < 65535 else "8000"
        reason = error.strerror or str(error)
        raise ConfigError(f"{host}:{port}: {reason}", hint) from error
    return listener


def uvicorn_config(app: App, idle_seconds: int = 30) -> uvicorn.Config:
    """Return how uvicorn speaks HTTP here."""
    return uvicorn.Config(
        app, http=Protocol, ws="none", lifespan="off", loop="asyncio", log_config=None,
        log_level="critical",
        access_log=False, server_header=False, proxy_headers=False, timeout_keep_alive=idle_seconds,
        h11_max_incomplete_event_size=1 << 15, backlog=_BACKLOG,
    )  # fmt: skip


def serve(
    app: App,
    engine: Engine,
    listener: socket.socket,
    *,
    drain_seconds: float,
    on_ready: Callable[[], None],
) -> int:
    """Answer requests until a signal, and return the exit code.

    SIGTERM finishes what is running, within `drain_seconds`; a second one, and Ctrl-C, end at once.
    """
    code = asyncio.run(
        _serve(_Server(uvicorn_config(app)), engine, listener, drain_seconds, on_ready)
    )
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the work is done
    return code


async def _serve(
    server: uvicorn.Server,
    engine: Engine,
    listener: socket.socket,
    drain_seconds: float,
    on_ready: Callable[[], None],
) -> int:
    loop, code = asyncio.get_running_loop(), 0

    def end_at_once() -> None:
        engine.end_all()
        server.should_exit = server.force_exit = True
        for task in server.server_state.tasks:
            task.cancel()

    def terminate(*_: Any) -> None:
        if engine.is_draining:
            end_at_once()
            return
        engine.is_draining = server.should_exit = True
        loop.call_later(drain_seconds, engine.end_all)
        loop.call_later(drain_seconds + 2, end_at_once)  # clients that do not read

    def interrupt(*_: Any) -> None:
        nonlocal code
        code = EXIT_INTERRUPTED
        engine.is_draining = True
        end_at_once()

    for number, handler in ((signal.SIGTERM, terminate), (signal.SIGINT, interrupt)):
        try:
            loop.add_signal_handler(number, handler)
        except (NotImplementedError, RuntimeError, ValueError):  # Windows, or not the main thread
            with contextlib.suppress(ValueError):
                signal.signal(number, lambda *_, do=handler: loop.call_soon_threadsafe(do))
    failures = list[Exception]()

    def begin() -> None:
        try:
            on_ready()
        except Exception as error:  # no place for its output
            failures.append(error)
            end_at_once()

    loop.call_soon(begin)
    try:
        await server.serve(sockets=[listener])
    finally:
        engine.close()
    if failures:
        raise failures[0]
    return code
