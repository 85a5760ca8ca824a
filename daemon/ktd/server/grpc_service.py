"""The gRPC door: ktd.v1.Engine, health and reflection."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection, reflection_pb2

import ktd
from ktd.chat.request import from_proto
from ktd.errors import SettingsError, Stalled
from ktd.server.authorization import carries_key
from ktd.server.decoding import Context, check_decoded, parser
from ktd.server.health import Health
from ktd.server.host import STALL_SECONDS, Host, State
from ktd.server.listeners import listeners
from ktd.server.proto_events import to_proto
from ktd.server.reading import chat_request, read
from ktd.server.responses import MOST_BYTES
from ktd.server.status import sentence_of, status_of
from ktd.types import ChatRequest
from ktd_proto.v1 import engine_pb2 as pb

log = logging.getLogger(__name__)

# Of one connection at once; more wait in the client. Health is watched without a key, 23 KB a stream.
MOST_STREAMS = 1024
# Connections without a call are closed after so long.
LONGEST_IDLE_MS = 600_000
SERVICE = pb.DESCRIPTOR.services_by_name["Engine"].full_name
_STATES = {
    State.LOADING: pb.GetStatusResponse.STATE_LOADING,
    State.READY: pb.GetStatusResponse.STATE_READY,
    State.DRAINING: pb.GetStatusResponse.STATE_DRAINING,
    State.FAILED: pb.GetStatusResponse.STATE_FAILED,
}


class EngineServicer:
    """The methods of ktd.v1.Engine over one Host."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def chat(self, request: bytes, context: Context) -> None:
        """Streams one answer. Leaving this method, by cancellation or deadline too, frees the sequence."""
        try:
            with self._host.room.holding(len(request)):
                checked = await read(request, self._checked)
                async with aclosing(self._host.chat(checked, context.peer())) as events:
                    sequence = 0
                    async for event in events:
                        sequence += 1
                        await _write(context, to_proto(event, checked.request_id, sequence))
            return
        except Exception as error:  # every failure becomes one status with a readable message
            status, sentence = status_of(error).grpc, sentence_of(error)
        # gRPC keeps what abort raises, and so this frame, until the next collection of cycles: a request may
        # take a gigabyte.
        del request
        await context.abort(status, sentence)

    def _checked(self, data: bytes) -> ChatRequest:
        request = chat_request(data)
        self._host.served.check_name(request.model)
        return from_proto(request, self._host.defaults)

    async def list_models(
        self, request: pb.ListModelsRequest | DecodeError, context: Context
    ) -> pb.ListModelsResponse:
        await check_decoded(request, pb.ListModelsRequest, context)
        served = self._host.served
        model = pb.Model(
            id=served.name,
            file_name=served.file_name,
            architecture=served.architecture,
            parameters=served.parameters,
            context_length=served.context,
            quantisation=served.quantisation,
            created=served.created,
        )
        return pb.ListModelsResponse(models=[model])

    async def get_status(
        self, request: pb.GetStatusRequest | DecodeError, context: Context
    ) -> pb.GetStatusResponse:
        await check_decoded(request, pb.GetStatusRequest, context)
        host, engine = self._host, self._host.engine_status()
        return pb.GetStatusResponse(
            state=_STATES[host.state],
            version=ktd.__version__,
            isa=host.loaded.isa if host.loaded else "",
            threads=host.loaded.threads if host.loaded else 0,
            running=engine.running,
            waiting=engine.waiting,
            pages_total=engine.pages_total,
            pages_free=engine.pages_free,
            uptime_seconds=time.monotonic() - host.started,
            load_progress=host.load_progress,
            message=host.message,
        )


async def _write(context: Context, message: Message) -> None:
    """Raises Stalled when the client takes nothing for too long."""
    try:
        async with asyncio.timeout(STALL_SECONDS):
            await context.write(message)
    except TimeoutError:
        said = f"Nothing of this answer was read for {STALL_SECONDS:g} s: it was ended."
        log.info("A client at %s: %s", context.peer(), said)
        raise Stalled(said) from None


class BearerAuth(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # no generic at run time
    """Lets calls through that carry the key. Health needs none: supervisors and `ktd wait` ask it."""

    def __init__(self, api_key: str) -> None:
        self._api_key = api_key

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        if details.method.startswith(f"/{health.SERVICE_NAME}/"):
            return await continuation(details)
        given = [value for key, value in details.invocation_metadata if key == "authorization"]
        if carries_key(given, self._api_key):
            return await continuation(details)
        # As if it took a stream, of which nothing is read: a request may have 16 MiB.
        return grpc.stream_unary_rpc_method_handler(_refuse_key)


async def _refuse_key(requests: object, context: Context) -> None:
    await context.abort(
        grpc.StatusCode.UNAUTHENTICATED,
        'The API key is missing or wrong: send it as "authorization: Bearer <key>".',
    )


def _reflection() -> grpc.GenericRpcHandler[Any, Any]:
    """What is no request of reflection is read as an empty one, which is refused in its own words."""
    read = parser(reflection_pb2.ServerReflectionRequest)
    names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)

    def or_empty(data: bytes) -> reflection_pb2.ServerReflectionRequest:
        request = read(data)
        return reflection_pb2.ServerReflectionRequest() if isinstance(request, DecodeError) else request

    method = grpc.stream_stream_rpc_method_handler(
        reflection.aio.ReflectionServicer(names).ServerReflectionInfo,  # type: ignore[attr-defined]
        or_empty,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    return grpc.method_handlers_generic_handler(reflection.SERVICE_NAME, {"ServerReflectionInfo": method})


class GrpcServer:
    """The listening server. Health says NOT_SERVING until `set_serving(True)`."""

    def __init__(self, host: Host, address: str, *, certificate: tuple[Path, Path] | None = None) -> None:
        """Binds `address` ("host:port", port 0 for any). `certificate` is (certificate chain, key) in PEM.

        Raises SettingsError when the address cannot be bound or the certificate cannot be used.
        """
        self._server = grpc.aio.server(
            interceptors=[BearerAuth(host.api_key)] if host.api_key else [],
            options=[
                # Two daemons on one port would share the calls: let the second one fail.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", MOST_BYTES),
                ("grpc.max_concurrent_streams", MOST_STREAMS),
                # What is sent and not yet asked for: with probes, megabytes of each call lie here.
                ("grpc.http2.bdp_probe", 0),
                # Each takes a descriptor; a client that comes back connects anew by itself.
                ("grpc.max_connection_idle_ms", LONGEST_IDLE_MS),
                # Clients may ping a connection that waits for a long prefill.
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ],
        )
        servicer = EngineServicer(host)
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            "Chat": grpc.unary_stream_rpc_method_handler(
                servicer.chat, response_serializer=pb.ChatEvent.SerializeToString
            ),
            "ListModels": grpc.unary_unary_rpc_method_handler(
                servicer.list_models,
                parser(pb.ListModelsRequest),
                pb.ListModelsResponse.SerializeToString,
            ),
            "GetStatus": grpc.unary_unary_rpc_method_handler(
                servicer.get_status,
                parser(pb.GetStatusRequest),
                pb.GetStatusResponse.SerializeToString,
            ),
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
        self._health = Health()
        self._server.add_generic_rpc_handlers((self._health.handler, _reflection()))
        self.port = self._bind(address, certificate)

    def _bind(self, address: str, certificate: tuple[Path, Path] | None) -> int:
        try:
            if certificate is None:
                return self._server.add_insecure_port(address)
            chain, key = (path.read_bytes() for path in certificate)
            credentials = grpc.ssl_server_credentials([(key, chain)])
            return self._server.add_secure_port(address, credentials)
        except OSError as error:
            raise SettingsError(f"The certificate cannot be read: {error}.") from error
        except RuntimeError as error:
            taken = listeners(int(address.rpartition(":")[2]))
            why = (
                f"{taken[0]} does already"
                if taken
                else "the port is taken or the address is not this machine's"
            )
            raise SettingsError(
                f"gRPC cannot listen on {address}: {why}. Choose another with --grpc-port or --grpc-host."
            ) from error

    async def start(self) -> None:
        """Accepts calls; health says NOT_SERVING."""
        await self._server.start()
        await self.set_serving(False)

    async def set_serving(self, serving: bool) -> None:
        """What health says, for the whole server and for the service by name."""
        for service in ("", SERVICE):
            await self._health.set(service, serving=serving)

    async def stop(self, grace: float) -> None:
        """Refuses new calls, lets the running ones end for `grace` seconds, then cancels them."""
        await self._server.stop(grace)
