"""The socket of a server, and connections on which nothing comes."""

import asyncio
import http.client
import socket
import time
from pathlib import Path

import pytest

from gptcli.errors import ConfigError
from gptcli.serving.server import bind
from support.serving import Served, serving

HEAD = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"


def test_a_port_belongs_to_one_server_from_the_start() -> None:
    with bind("127.0.0.1", 0) as first, pytest.raises(ConfigError, match="in use"):
        bind("127.0.0.1", first.getsockname()[1])


def test_an_address_of_another_machine_is_not_blamed_on_the_port() -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1") as caught:
        bind("192.0.2.1", 0)
    assert "--host" in str(caught.value.hint) and "--port" not in str(caught.value.hint)


def test_small_parts_of_an_answer_are_sent_at_once() -> None:
    delays = list[int]()

    async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = writer.get_extra_info("socket")
        delays.append(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    async def connect() -> None:
        with bind("127.0.0.1", 0) as listener:
            async with await asyncio.start_server(accept, sock=listener):
                reader, writer = await asyncio.open_connection(*listener.getsockname())
                await reader.read()
                writer.close()

    asyncio.run(connect())
    assert delays and all(delays)  # without it, a part waits until the one before is acknowledged


def seconds_until_closed(server: Served, first: bytes, more: bytes) -> float:
    """Send bytes, then some again and again; return how long the server listens."""
    began = time.monotonic()
    with socket.create_connection(("127.0.0.1", server.port), timeout=0.1) as connection:
        connection.sendall(first)
        while time.monotonic() < began + 20:
            try:
                if not connection.recv(65536):
                    break
            except TimeoutError:
                connection.sendall(more)
            except ConnectionError:
                break
    return time.monotonic() - began


def test_a_connection_without_a_request_is_closed(run: Path) -> None:
    with serving("tiny", idle_seconds=2) as server:
        for first, more in ((b"", b""), (HEAD, b""), (HEAD, b"X: y\r\n"), (HEAD + b"\r\n", b"")):
            assert 0.5 < seconds_until_closed(server, first, more) < 15, (first, more)
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=10)
        connection.auto_open = 0  # one that asks again and again is not closed
        connection.connect()
        for _ in range(5):
            time.sleep(0.5)
            connection.request("GET", "/healthz")
            answer = connection.getresponse()
            assert (answer.status, answer.read()) == (200, b'{"status": "ok"}')
        connection.close()
