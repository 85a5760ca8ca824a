"""The Pipe pointed at a scripted HTTP service."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from pipe_kit import Reply, Shown, VendorServer, ask, browser_body, load_pipe_module, vendor_server

module: Any = load_pipe_module()


@asynccontextmanager
async def pipe_to(url: str, **valves: Any) -> AsyncIterator[Any]:
    pipe = module.Pipe()
    pipe.valves = pipe.Valves(**{"BASE_URL": url, "API_KEY": "k", "MODELS": "r1", **valves})
    try:
        yield pipe
    finally:
        await pipe._links.close()


async def converse(reply: Reply, **valves: Any) -> tuple[Shown, VendorServer]:
    async with vendor_server(lambda request: reply) as server, pipe_to(server.url, **valves) as pipe:
        return await ask(pipe, browser_body("hello", model="ktd.r1")), server
