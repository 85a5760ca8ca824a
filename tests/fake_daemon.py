"""Serves the scripted engine: `python tests/fake_daemon.py [GRPC_PORT [HTTP_PORT]]` prints the addresses and
waits.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from fakes import SERVED, FakeEngine, FakeText, echo

from ktd.chat import ChatService
from ktd.server.grpc_service import GrpcServer
from ktd.server.host import Host, Loaded
from ktd.server.http_app import HttpServer


@dataclass(frozen=True)
class FakeDaemon:
    address: str  # of gRPC: "127.0.0.1:PORT"
    url: str  # of HTTP: "http://127.0.0.1:PORT"
    engine: FakeEngine
    host: Host
    grpc: GrpcServer


@asynccontextmanager
async def fake_daemon(
    script: Callable[[str], str] = echo,
    *,
    port: int = 0,
    http_port: int = 0,
    api_key: str | None = None,
    loading: bool = False,
    **options: float,
) -> AsyncIterator[FakeDaemon]:
    """Both doors over FakeEngine(script, **options), on free ports of the loopback."""
    engine = FakeEngine(script, **options)  # type: ignore[arg-type]
    engine.start()
    host = Host(SERVED, api_key=api_key)
    server = GrpcServer(host, f"127.0.0.1:{port}")
    http = HttpServer(host, "127.0.0.1", http_port)
    await server.start()
    await http.start()
    if not loading:
        host.ready(Loaded(ChatService(engine, FakeText(), SERVED), engine, "scalar", 1))
        await server.set_serving(True)
    try:
        url = f"http://127.0.0.1:{http.port}"
        yield FakeDaemon(f"127.0.0.1:{server.port}", url, engine, host, server)
    finally:
        await http.stop(0)
        await server.stop(0)
        engine.stop()


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for localhost: (chain, key), in PEM."""
    chain, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
         "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(chain)],
        check=True, capture_output=True,
    )  # fmt: skip
    return chain, key


async def main(port: int = 0, http_port: int = 0) -> None:
    async with fake_daemon(port=port, http_port=http_port, step_seconds=0.02) as daemon:
        print(f"grpc://{daemon.address} {daemon.url}", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(*map(int, sys.argv[1:3])))
