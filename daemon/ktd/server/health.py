"""gRPC's health service. It needs no key: what strangers send is small, and so many watch at most."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TypeAlias

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2

from ktd.server.decoding import Context, check_decoded, parser

# Of all connections at once, 23 KB each.
MOST_WATCHES = 4096
# Requests received at once: gRPC takes 16 MiB of each, small or not, before it can be looked at.
_MOST_READ = 4
READ_SECONDS = 5.0

_Request: TypeAlias = health_pb2.HealthCheckRequest | DecodeError


class Health:
    """What is said of each service. `handler` is what a server adds."""

    def __init__(self) -> None:
        self._states = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._watching = 0
        self._reading = asyncio.Semaphore(_MOST_READ)
        read = parser(health_pb2.HealthCheckRequest)
        write = health_pb2.HealthCheckResponse.SerializeToString
        methods = {
            # As streams of requests, which nobody reads before these ask for one.
            "Check": grpc.stream_unary_rpc_method_handler(self._check, read, write),
            "Watch": grpc.stream_stream_rpc_method_handler(self._watch, read, write),
        }
        self.handler = grpc.method_handlers_generic_handler(health.SERVICE_NAME, methods)

    async def set(self, service: str, *, serving: bool) -> None:
        """What is said of `service` from now on."""
        states = health_pb2.HealthCheckResponse
        await self._states.set(service, states.SERVING if serving else states.NOT_SERVING)

    async def _check(
        self, requests: AsyncIterator[_Request], context: Context
    ) -> health_pb2.HealthCheckResponse:
        request = await self._read(requests, context)
        answer: health_pb2.HealthCheckResponse = await self._states.Check(request, context)
        return answer

    async def _watch(self, requests: AsyncIterator[_Request], context: Context) -> None:
        request = await self._read(requests, context)
        if self._watching >= MOST_WATCHES:
            said = f"{MOST_WATCHES} clients watch this daemon's health already: ask with Check."
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, said)
        self._watching += 1
        try:
            await self._states.Watch(request, context)
        finally:
            self._watching -= 1

    async def _read(self, requests: AsyncIterator[_Request], context: Context) -> _Request:
        """The one request of a call."""
        try:
            async with self._reading, asyncio.timeout(READ_SECONDS):
                request = await anext(requests, DecodeError())
        except TimeoutError:
            said = f"The request did not come within {READ_SECONDS:g} s."
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, said)
        await check_decoded(request, health_pb2.HealthCheckRequest, context)
        return request
