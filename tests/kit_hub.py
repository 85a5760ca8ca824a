"""A hub of models on the loopback: as much of Hugging Face's and ModelScope's HTTP as `ktd pull` asks for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

REPO = "someone/Tiny-GGUF"


@dataclass
class FakeHub:
    """What it serves and how it misbehaves; what it was asked."""

    files: dict[str, bytes]
    url: str = ""
    promised: dict[str, str] = field(default_factory=dict)  # SHA-256 that are listed instead of the true ones
    breaks_after: list[int] = field(default_factory=list)  # bytes of the next answers, then the line breaks
    stalls_after: int | None = None  # bytes of an answer, then nothing more comes
    ranges: bool = True
    status: int = 200
    error_code: str = ""
    elsewhere: str = ""  # another server that files are redirected to
    page: int = 100  # entries in one answer
    listing: Any = None
    asked: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    ranges_asked: list[str | None] = field(default_factory=list)  # one for each answer with bytes
    stop: threading.Event = field(default_factory=threading.Event)

    def sha256(self, path: str) -> str:
        return self.promised.get(path) or hashlib.sha256(self.files[path]).hexdigest()

    def huggingface(self, start: int) -> list[dict[str, Any]]:
        entries: list[dict[str, Any]] = [{"type": "directory", "path": "folder.gguf", "size": 0, "oid": "0"}]
        entries += [
            {"type": "file", "path": path, "size": len(data), "oid": "1" * 40,
             "lfs": {"oid": self.sha256(path), "size": len(data), "pointerSize": 135}}
            for path, data in self.files.items()
        ]  # fmt: skip
        return entries[start : start + self.page]

    def modelscope(self) -> dict[str, Any]:
        entries: list[dict[str, Any]] = [{"Type": "tree", "Path": "folder.gguf", "Size": 0, "Sha256": ""}]
        entries += [
            {"Type": "blob", "Path": path, "Size": len(data), "Sha256": self.sha256(path)}
            for path, data in self.files.items()
        ]
        return {"Code": 200, "Data": {"Files": entries}, "Success": True}


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        query = {name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()}
        self.hub.asked.append((self.path, dict(self.headers)))
        start = int(query.get("cursor", 0))
        if self.hub.status != 200:
            self._send(self.hub.status, b"<html>no</html>", {"x-error-code": self.hub.error_code})
        elif path in (f"/api/models/{REPO}/tree/main", f"/api/v1/models/{REPO}/repo/files"):
            entries: Any = self.hub.modelscope()
            headers = {}
            if path.startswith("/api/models"):
                entries = self.hub.huggingface(start)
                if len(entries) == self.hub.page:
                    following = f"https://elsewhere.example{path}?cursor={start + self.hub.page}"
                    headers = {"link": f'<{following}>; rel="next"'}
            self._send(200, json.dumps(self.hub.listing or entries).encode(), headers)
        elif path.startswith(f"/{REPO}/resolve/main/"):
            name = path.removeprefix(f"/{REPO}/resolve/main/")
            if self.hub.elsewhere:
                self._send(302, b"", {"location": f"{self.hub.elsewhere}/elsewhere/{quote(name)}"})
            else:
                self._bytes(name)
        elif path.startswith("/elsewhere/"):
            self._bytes(path.removeprefix("/elsewhere/"))
        elif path == f"/api/v1/models/{REPO}/repo" and query["Revision"] == "master":
            self._bytes(query["FilePath"])
        else:
            self._send(404, b"{}", {})

    def _bytes(self, name: str) -> None:
        data = self.hub.files[name]
        begin = 0
        self.hub.ranges_asked.append(self.headers["range"])
        if self.hub.ranges and "range" in self.headers:
            begin = int(self.headers["range"].removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("content-range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.send_header("content-length", str(len(data) - begin))
        self.end_headers()
        if self.hub.stalls_after is not None:
            self.wfile.write(data[begin : begin + self.hub.stalls_after])
            self.hub.stop.wait(60)
            return
        size = self.hub.breaks_after.pop(0) if self.hub.breaks_after else len(data)
        self.wfile.write(data[begin : begin + size])

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def fake_hub(files: dict[str, bytes]) -> Iterator[FakeHub]:
    """A running hub with one repository, REPO."""
    hub = FakeHub(files)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.stop.set()
        server.shutdown()
        server.server_close()
        thread.join()
