"""gRPC's health service. It needs no key: what strangers send is small, and so many watch at most."""

from __future__ import annotations

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2

from ktd.server.decoding import Context, check_decoded, parser

# Of all connections at once, 23 KB each.
MOST_WATCHES = 4096


class Health:
    """What is said of each service. `handler` is what a server adds."""

    def __init__(self) -> None:
        self._states = health.aio.HealthServicer()  # type: ignore[attr-defined]
        self._watching = 0
        read = parser(health_pb2.HealthCheckRequest)
        write = health_pb2.HealthCheckResponse.SerializeToString
        methods = {
            "Check": grpc.unary_unary_rpc_method_handler(self._check, read, write),
            "Watch": grpc.unary_stream_rpc_method_handler(self._watch, read, write),
        }
        self.handler = grpc.method_handlers_generic_handler(health.SERVICE_NAME, methods)

    async def set(self, service: str, *, serving: bool) -> None:
        """What is said of `service` from now on."""
        states = health_pb2.HealthCheckResponse
        await self._states.set(service, states.SERVING if serving else states.NOT_SERVING)

    async def _check(
        self, request: health_pb2.HealthCheckRequest | DecodeError, context: Context
    ) -> health_pb2.HealthCheckResponse:
        await check_decoded(request, health_pb2.HealthCheckRequest, context)
        answer: health_pb2.HealthCheckResponse = await self._states.Check(request, context)
        return answer

    async def _watch(self, request: health_pb2.HealthCheckRequest | DecodeError, context: Context) -> None:
        await check_decoded(request, health_pb2.HealthCheckRequest, context)
        if self._watching >= MOST_WATCHES:
            said = f"{MOST_WATCHES} clients watch this daemon's health already: ask with Check."
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, said)
        self._watching += 1
        try:
            await self._states.Watch(request, context)
        finally:
            self._watching -= 1
