"""Daemons for tests of the Pipe: one that says what it is told, and the Pipe pointed at it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
from pipe_kit import load_pipe_module

from ktd_proto.v1 import engine_pb2, engine_pb2_grpc

module: Any = load_pipe_module()


@asynccontextmanager
async def pipe_to(address: str, **valves: Any) -> AsyncIterator[Any]:
    pipe = module.Pipe()
    pipe.valves = pipe.Valves(BASE_URL=f"grpc://{address}", **valves)
    try:
        yield pipe
    finally:
        await pipe._links.close()


class Scripted(engine_pb2_grpc.EngineServicer):
    """A daemon that says what it is told: per call a list of events, pauses and (code, message)."""

    def __init__(self, *calls: Sequence[Any]) -> None:
        self.calls = list(calls)
        self.requests: list[engine_pb2.ChatRequest] = []
        self.cancelled = 0

    async def Chat(self, request: Any, context: Any) -> Any:
        self.requests.append(request)
        try:
            for number, item in enumerate(self.calls.pop(0), start=1):
                if isinstance(item, float):
                    await asyncio.sleep(item)
                elif isinstance(item, tuple):
                    await context.abort(*item)
                else:
                    yield engine_pb2.ChatEvent(request_id="r", sequence=number, **item)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise

    async def ListModels(self, request: Any, context: Any) -> Any:
        return engine_pb2.ListModelsResponse()

    async def GetStatus(self, request: Any, context: Any) -> Any:
        return engine_pb2.GetStatusResponse()


@asynccontextmanager
async def scripted_daemon(*calls: Sequence[Any]) -> AsyncIterator[tuple[str, Scripted]]:
    servicer, server = Scripted(*calls), grpc.aio.server()
    engine_pb2_grpc.add_EngineServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}", servicer
    finally:
        await server.stop(0)


@asynccontextmanager
async def scripted_pipe(*calls: Sequence[Any], **valves: Any) -> AsyncIterator[tuple[Any, Scripted]]:
    async with scripted_daemon(*calls) as (address, daemon), pipe_to(address, **valves) as pipe:
        yield pipe, daemon


STOP = {"finished": engine_pb2.Finished(reason=engine_pb2.FINISH_REASON_STOP)}


def text(answer: str) -> dict[str, Any]:
    return {"answer": engine_pb2.Answer(text=answer)}


def thought(reasoning: str) -> dict[str, Any]:
    return {"reasoning": engine_pb2.Reasoning(text=reasoning)}


QUEUED = {"queued": engine_pb2.Queued(position=3)}


def call(name: str, arguments: str = "{}", index: int = 0) -> dict[str, Any]:
    return {
        "tool_call": engine_pb2.ToolCall(id=f"c{index}", name=name, arguments_json=arguments, index=index)
    }


SOURCES = [
    {
        "source": {"id": "http://a/", "name": "A"},
        "document": ["text a"],
        "metadata": [{"source": "http://a/"}],
    },
    {"source": {"id": "f", "name": "B"}, "document": ["text b"], "metadata": [{"source": "b.txt"}]},
]
