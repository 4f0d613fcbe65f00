"""A Hugging Face hub on this machine, for tests: the endpoints of huggingface_hub and datasets.

Both libraries read the hub's address when they are imported, so what shall meet this one runs in a
process of its own: see `visitor`.
"""

import json
import multiprocessing
import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from nanogpt.data.source import Source

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """The data sets in the folders `folder/owner/name`, as a server on loopback.

    `failures` are a status and a code each, given instead of the next answers with a file's bytes.
    """

    folder: Path
    failures: list[tuple[int, str]] = field(default_factory=list)
    url: str = ""


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve until the block ends."""

    class Handler(_Handler):
        the_hub = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def visitor(endpoint: str, cache: Path) -> Iterator[Executor]:
    """A process that takes `endpoint` for the hub; its calls are of functions of this module."""
    away = {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "HF_TOKEN": ""}
    before = {name: os.environ.get(name) for name in away}
    os.environ.update(away)
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(int).result()  # it has started, with this environment
            yield pool
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def documents(source: Source, skip: int = 0) -> list[str | None]:
    return list(source.pinned().documents(skip))  # as a preparation reads them


def pinned(source: Source) -> Source:
    return source.pinned()


class _Handler(BaseHTTPRequestHandler):
    the_hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_POST(self) -> None:
        self.data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        match = re.fullmatch("(/api)?/datasets/([^/]+/[^/]+)(?:/(.*))?", path)
        self.repository = self.the_hub.folder / (match[2] if match else "none")
        if path == "/":
            self._send(b"", body)
        elif match is None or not self.repository.is_dir():
            self._refuse(404, "RepoNotFound")
        elif match[1]:
            self._api(match[3] or "revision/main", body)
        else:
            self._resolve(match[3], body)

    def _api(self, what: str, body: bool) -> None:
        verb, _, rest = what.partition("/")
        revision, _, path = rest.partition("/")
        if revision not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound")
        elif verb == "revision":
            name = self.repository.relative_to(self.the_hub.folder).as_posix()
            info = {"id": name, "sha": COMMIT, "private": False, "siblings": []}
            self._send(json.dumps(info).encode(), body)
        elif verb == "tree" and (self.repository / path).is_dir():
            top = self.repository / path
            recursive = "recursive=true" in self.path.lower()
            paths = sorted(top.rglob("*") if recursive else top.iterdir())
            self._send(json.dumps([self._entry(path) for path in paths]).encode(), body)
        elif verb == "paths-info":
            paths = [self.repository / name for name in self._requested_paths()]
            found = [self._entry(path) for path in paths if path.exists()]
            self._send(json.dumps(found).encode(), body)
        else:
            self._refuse(404, "EntryNotFound")

    def _requested_paths(self) -> list[str]:
        if self.data.startswith(b"{"):
            return list(json.loads(self.data)["paths"])
        return parse_qs(self.data.decode())["paths"]

    def _resolve(self, what: str, body: bool) -> None:
        """Answer resolve/REVISION/PATH with a file, or the requested range of it."""
        _, revision, name = what.split("/", maxsplit=2)
        path = self.repository / name
        if revision not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound")
        elif not path.is_file():
            self._refuse(404, "EntryNotFound")
        elif self.command == "GET" and self.the_hub.failures:
            self._refuse(*self.the_hub.failures.pop(0))
        else:
            self._send_file(path.read_bytes(), body)

    def _send_file(self, data: bytes, body: bool) -> None:
        headers = {"ETag": f'"{len(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status = 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, stop = int(match[1]), min(int(match[2] or len(data)) + 1, len(data))
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            data, status = data[start:stop], 206
        self._send(data, body, status, headers)

    def _entry(self, path: Path) -> dict[str, Any]:
        name = path.relative_to(self.repository).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
        return {"type": "file", "path": name, "oid": "0" * 40, "size": path.stat().st_size}

    def _refuse(self, status: int, code: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": "refused"}
        self._send(b"", False, status, headers)

    def _send(
        self, data: bytes, body: bool, status: int = 200, headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)
