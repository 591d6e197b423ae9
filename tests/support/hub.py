"""A Hugging Face Hub on 127.0.0.1, with as much of its protocol as data sets and models need.

It holds repositories as {"org/name": {"path/in/repository": content}}, all at one commit; a model
asked for at another commit has the same files there.
"""

import base64
import hashlib
import json
import os
import re
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

Repositories = dict[str, dict[str, bytes]]

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# `gpt`, but with short waits between the tries of a download.
IMPATIENT = """
import sys
from gptcli import cli
from gptcli.data import hub
hub._WAITS = (0.1, 0.1)
sys.exit(cli.run(sys.argv[1:]))
"""


def environment(folder: Path, url: str) -> dict[str, str]:
    """Return an environment that sees the Hub at `url`, with its caches in `folder`."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
    env |= {"HF_HOME": str(folder.resolve() / "hf"), "HOME": str(folder.resolve())}
    return env | {"HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1"}


class Hub:
    """Serves repositories while the `with` block runs.

    `faults` says what the first GETs of a file answer instead: a status, or "cut" for half of it.

    Attributes:
        repositories: What it holds now.
        url: What HF_ENDPOINT is set to.
        requests: "METHOD /path" of every request so far.
        tokens: The Authorization headers of all that was to be written.
        ranges: The paths that a part was asked of, each with the bytes it began at.
    """

    def __init__(
        self, repositories: Repositories, faults: dict[str, list[int | str]] | None = None
    ) -> None:
        self.repositories, self.requests = repositories, list[str]()
        self.ranges: list[tuple[str, int]] = []
        self.tokens: list[str | None] = []
        hub = self

        class Handler(_Handler):
            requests = hub.requests
            ranges = hub.ranges
            tokens = hub.tokens

        Handler.repositories, Handler.large = repositories, {}
        Handler.faults = {path: list(those) for path, those in (faults or {}).items()}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repositories: Repositories
    requests: list[str]
    ranges: list[tuple[str, int]]
    tokens: list[str | None]
    large: dict[str, bytes]
    faults: dict[str, list[int | str]]

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing on stderr."""

    def do_GET(self) -> None:
        """Answer a request."""
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length).decode(errors="surrogateescape")
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.requests.append(f"{self.command} {path}")
        if self._take(path, body):
            return
        if match := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/([^/]+)/(.+))?", path):
            self._api(match[1], match[2], match[3] or "", body)
        elif match := re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(match[1], match[2], match[3])
        else:
            self._missing("EntryNotFound")

    do_HEAD = do_POST = do_PUT = do_GET

    def _take(self, path: str, body: str) -> bool:
        """Take part of an upload: a repository, which files are large, those, and the commit."""
        if self.command not in ("POST", "PUT"):
            return False
        here = f"http://{self.headers['Host']}"
        if match := re.fullmatch(r"/large/(\w+)", path):
            self.large[match[1]] = body.encode(errors="surrogateescape")
            self._reply("{}")
            return True
        if path == "/api/validate-yaml":
            self._reply('{"errors": [], "warnings": []}')
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.tokens.append(self.headers.get("Authorization"))
            if self.faults.get(name):
                self._reply('{"error": "no write access"}', status=int(self.faults[name].pop()))
                return True
            self.repositories.setdefault(name, {})
            self._reply(json.dumps({"url": f"{here}/{name}", "name": name}))
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/main", path):
            large = (".safetensors", ".gguf")
            files = [
                {"path": file["path"], "shouldIgnore": False,
                 "uploadMode": "lfs" if file["path"].endswith(large) else "regular"}
                for file in json.loads(body)["files"]
            ]  # fmt: skip
            self._reply(json.dumps({"files": files}))
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                one | {"actions": {"upload": {"href": f"{here}/large/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            self._reply(json.dumps({"transfer": "basic", "objects": objects}))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self._commit(match[1], [json.loads(line) for line in body.splitlines()], here)
        else:
            return False
        return True

    def _commit(self, name: str, lines: list[dict[str, Any]], here: str) -> None:
        files = self.repositories[name]
        for line in lines:
            match line["key"]:
                case "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                case "lfsFile":
                    files[line["value"]["path"]] = self.large[line["value"]["oid"]]
        done = {"commitUrl": f"{here}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
        self._reply(json.dumps(done))

    def _api(self, name: str, verb: str | None, rest: str, body: str) -> None:
        """Describe a data set, list a folder of it, or tell the sizes of some files."""
        files = self.repositories.get(name)
        if files is None:
            self._missing("RepoNotFound")
            return
        match verb:
            case "tree":
                folder = rest.partition("/")[2].strip("/")
                listed = self._tree(files, folder)
                self._reply(json.dumps(listed)) if listed else self._missing("EntryNotFound")
            case "paths-info":
                paths = (
                    json.loads(body)["paths"]
                    if body.startswith("{")
                    else urllib.parse.parse_qs(body)["paths"]
                )
                found = [_entry(path, files[path]) for path in paths if path in files]
                self._reply(json.dumps(found))
            case _:
                asked = re.search(r"/revision/([0-9a-f]{40})", self.path)
                sha = asked[1] if asked else COMMIT
                about = {"id": name, "sha": sha, "private": False, "tags": []}
                siblings = [{"rfilename": path} for path in files]
                self._reply(json.dumps(about | {"siblings": siblings}))

    def _tree(self, files: dict[str, bytes], folder: str) -> list[dict[str, Any]]:
        """List the files and folders right in a folder, or with `recursive` all below it."""
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        recursive = query.get("recursive", ["false"])[0].lower() == "true"
        prefix = f"{folder}/" if folder else ""
        listed: dict[str, dict[str, Any]] = {}
        for path, content in files.items():
            below, slash, _ = path.removeprefix(prefix).partition("/")
            if not path.startswith(prefix):
                continue
            if slash and not recursive:
                child = prefix + below
                listed[child] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": child}
            else:
                listed[path] = _entry(path, content)
        return list(listed.values())

    def _file(self, name: str, revision: str, path: str) -> None:
        if name not in self.repositories:
            self._missing("RepoNotFound")
        elif path not in self.repositories[name]:
            self._missing("EntryNotFound")
        else:
            content = self.repositories[name][path]
            fault = (
                self.faults[path].pop(0) if self.command == "GET" and self.faults.get(path) else 0
            )
            if fault == "cut":
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
                return
            if fault:
                self._reply("{}", {"Retry-After": "1"}, status=int(fault))
                return
            headers = {"ETag": f'"{_oid(content)}"'}
            asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
            if asked and int(asked[1]) and self.command == "GET":
                start, size = int(asked[1]), len(content)
                self.ranges.append((path, start))
                headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
                self._reply(content[start:], headers, status=206)
                return
            self._reply(content, headers)

    def _missing(self, code: str) -> None:
        self._reply("{}", {"X-Error-Code": code, "X-Error-Message": code}, status=404)

    def _reply(
        self, content: str | bytes, headers: dict[str, str] | None = None, status: int = 200
    ) -> None:
        data = content.encode() if isinstance(content, str) else content
        kind = "application/json" if isinstance(content, str) else "application/octet-stream"
        self.send_response(status)
        # A commit that is asked for by its name is the one that answers; a branch is at COMMIT.
        asked = re.search(r"/([0-9a-f]{40})(/|\?|$)", self.path)
        commit = asked[1] if asked else COMMIT
        always = {"Content-Type": kind, "Content-Length": str(len(data)), "X-Repo-Commit": commit}
        for header, value in (always | (headers or {})).items():
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _entry(path: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "oid": _oid(content), "size": len(content), "path": path}


def _oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
