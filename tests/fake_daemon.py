"""Serves the scripted engine over gRPC: `python tests/fake_daemon.py [PORT]` prints the address and waits."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fakes import SERVED, FakeEngine, FakeText, echo

from ktd.chat import ChatService
from ktd.server.grpc_service import GrpcServer
from ktd.server.host import Host, Loaded


@dataclass(frozen=True)
class FakeDaemon:
    address: str  # "127.0.0.1:PORT"
    engine: FakeEngine
    host: Host
    grpc: GrpcServer


@asynccontextmanager
async def fake_daemon(
    script: Callable[[str], str] = echo,
    *,
    port: int = 0,
    api_key: str | None = None,
    loading: bool = False,
    **options: float,
) -> AsyncIterator[FakeDaemon]:
    """A gRPC server over FakeEngine(script, **options) on a free port of the loopback."""
    engine = FakeEngine(script, **options)  # type: ignore[arg-type]
    engine.start()
    host = Host(SERVED, api_key=api_key)
    server = GrpcServer(host, f"127.0.0.1:{port}")
    await server.start()
    if not loading:
        host.ready(Loaded(ChatService(engine, FakeText(), SERVED), engine, "scalar", 1))
        await server.set_serving(True)
    try:
        yield FakeDaemon(f"127.0.0.1:{server.port}", engine, host, server)
    finally:
        await server.stop(0)
        engine.stop()


async def main(port: int) -> None:
    async with fake_daemon(port=port, step_seconds=0.02) as daemon:
        print(f"grpc://{daemon.address}", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]) if sys.argv[1:] else 0))
