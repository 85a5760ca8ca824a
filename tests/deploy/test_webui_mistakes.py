"""What `make webui` and the installation of the Pipe say to mistakes: one sentence each, and no trace."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from kit_daemon import free_port

SCRIPT = Path(__file__).parents[2] / "deploy" / "webui.py"


def said(*argv: str, **settings: str) -> str:
    """What the script writes when it fails."""
    environ = {**os.environ, "KTD_WEBUI_PASSWORD": "x", **settings}
    line = [sys.executable, SCRIPT, *argv]
    done = subprocess.run(line, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stdout
    assert "Traceback" not in done.stderr
    return done.stderr.strip()


class _Page(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.send_response(200)
        body = b"[]" if "json" in self.path else b"<html>"
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def page() -> Iterator[str]:
    """The address of a server that is no Open WebUI."""
    with HTTPServer(("127.0.0.1", 0), _Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("port", ["http", "0", "65536", "-1", "9" * 5000])
def test_a_port_that_is_none(port: str) -> None:
    assert "must be a port from 1 to 65535" in said("start", KTD_WEBUI_PORT=port)


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    program = tmp_path / "bin" / "open-webui"
    program.parent.mkdir()
    program.touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        sentence = said("start", KTD_WEBUI_PORT=port, KTD_WEBUI_ENV=str(tmp_path))
    assert sentence.startswith(f"Port {port} is taken by process {os.getpid()} (")


def test_a_setting_that_is_wrong(tmp_path: Path) -> None:
    settings = {"KTD_CONTEXT": "many", "KTD_WEBUI_PORT": str(free_port()), "KTD_WEBUI_ENV": str(tmp_path)}
    assert "KTD_CONTEXT is 'many'" in said("start", **settings)


def test_addresses_without_an_open_webui(page: str) -> None:
    assert "is no address" in said("install", "http://[::1", "a@b")
    assert "does not answer" in said("install", f"http://127.0.0.1:{free_port()}", "a@b")
    assert "does not answer" in said("install", "open-webui.example", "a@b")
    for path in ("", "/json"):
        assert "is no Open WebUI" in said("install", page + path, "a@b")
