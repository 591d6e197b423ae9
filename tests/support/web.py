"""A web server on this machine that serves a folder, and can be slow, broken or wrong."""

import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qsl, unquote


class _Server:
    """A server of a thread, from `with` to the end of its block."""

    def _serve(self, handler: type[BaseHTTPRequestHandler]) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class Web(_Server):
    """Serves the files below a folder; `trouble` may answer a request in its own way.

    Attributes:
        requests: The path and the first byte of each request.
    """

    def __init__(self, folder: Path, trouble: Callable[[Any, int], bool] | None = None) -> None:
        self.requests: list[tuple[str, int]] = []
        web = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                path, span = self.path.partition("?")[0], self.headers.get("Range")
                start = int(span.removeprefix("bytes=").rstrip("-")) if span else 0
                web.requests.append((path, start))
                if web.trouble is not None and web.trouble(self, start):
                    return
                file = folder / path.lstrip("/")
                if not file.is_file():
                    self.answer(404, b"")
                    return
                data = file.read_bytes()
                stamp = f'"{file.stat().st_mtime_ns}"'
                self.answer(206 if span else 200, data[start:], ETag=stamp)

            def answer(
                self, status: int, data: bytes, cut: int | None = None, **headers: str
            ) -> None:
                """Send an answer, or the start of it."""
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.close_connection = self.close_connection or cut is not None
                try:
                    self.wfile.write(data if cut is None else data[:cut])
                except OSError:
                    pass  # who asked wanted the headers only

            def log_message(self, *parts: Any) -> None:
                pass

        self.trouble = trouble
        self._serve(Handler)
        self._server.daemon_threads = False  # so that the end of the server is theirs

    @staticmethod
    def broken_after(n_bytes: int, times: int) -> Callable[[Any, int], bool]:
        """Return trouble that ends connections after some bytes, so many times."""
        left = [times]

        def trouble(handler: Any, start: int) -> bool:
            if not left[0] or handler.path.endswith(".json"):
                return False
            left[0] -= 1
            handler.answer(206 if start else 200, b"\0" * 10**6, cut=n_bytes)
            return True

        return trouble

    @staticmethod
    def slow(seconds: float) -> Callable[[Any, int], bool]:
        """Return trouble that lets every request wait."""

        def trouble(handler: Any, start: int) -> bool:
            time.sleep(seconds)
            return False

        return trouble


class Bucket(_Server):
    """An S3 of the folders below a folder, as far as reading takes it; each is a bucket.

    Attributes:
        is_closed: Refuse all requests.
    """

    def __init__(self, folder: Path) -> None:
        self.is_closed = False
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                path, _, query = self.path.partition("?")
                file = folder / unquote(path).lstrip("/")
                if store.is_closed:
                    self._answer(403, b"")
                elif "list-type" in query:
                    self._answer(200, self._listing(file, dict(parse_qsl(query)).get("prefix", "")))
                elif file.is_file():
                    self._send(file.read_bytes())
                else:
                    self._answer(200 if file.is_dir() and file.parent == folder else 404, b"")

            do_GET = do_HEAD

            def _send(self, data: bytes) -> None:
                if (span := self.headers.get("Range")) is None:
                    self._answer(200, data)
                    return
                first, _, last = span.removeprefix("bytes=").partition("-")
                end = min(int(last or len(data) - 1), len(data) - 1)
                where = f"bytes {first}-{end}/{len(data)}"
                self._answer(206, data[int(first) : end + 1], where)

            def _listing(self, bucket: Path, prefix: str) -> bytes:
                names = sorted(p.relative_to(bucket).as_posix() for p in bucket.rglob("*.*"))
                rows = "".join(
                    f"<Contents><Key>{name}</Key><Size>{(bucket / name).stat().st_size}</Size>"
                    "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
                    for name in names
                    if name.startswith(prefix) and (bucket / name).is_file()
                )
                head = "<ListBucketResult><IsTruncated>false</IsTruncated>"
                return f"{head}<KeyCount>{len(names)}</KeyCount>{rows}</ListBucketResult>".encode()

            def _answer(self, status: int, data: bytes, span: str | None = None) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
                if span:
                    self.send_header("Content-Range", span)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            def log_message(self, *parts: Any) -> None:
                pass

        self._serve(Handler)
