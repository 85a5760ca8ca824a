"""A daemon as its own commands see it: chat, state and health over gRPC."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ktd.errors import (
    Busy,
    EngineFailure,
    KtdError,
    RequestError,
    SettingsError,
    Unavailable,
    UnknownModel,
    UserError,
)
from ktd.types import (
    Answer,
    ChatEvent,
    ChatRequest,
    Finished,
    FinishReason,
    Prefill,
    Priority,
    Queued,
    Reasoning,
    Timings,
    ToolCall,
    Usage,
)
from ktd_proto.v1 import engine_pb2 as pb
from ktd_proto.v1 import engine_pb2_grpc

_ERRORS: dict[grpc.StatusCode, type[KtdError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: RequestError,
    grpc.StatusCode.NOT_FOUND: UnknownModel,
    grpc.StatusCode.UNAUTHENTICATED: UserError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Busy,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.INTERNAL: EngineFailure,
}
_REASONS = {
    pb.FINISH_REASON_STOP: FinishReason.STOP,
    pb.FINISH_REASON_LENGTH: FinishReason.LENGTH,
    pb.FINISH_REASON_TOOL_CALLS: FinishReason.TOOL_CALLS,
}


# What gRPC says of a connection that was made and came to nothing.
_CONNECTED = ("Failed parsing HTTP/2", "Socket closed", "handshake", "reset by peer", "Broken pipe")

# Seconds for an answer that takes a daemon no time.
_PATIENCE = 5.0


@dataclass(frozen=True, slots=True)
class Address:
    """Where a daemon listens. `authority` is "host:port"."""

    authority: str
    secure: bool

    def __str__(self) -> str:
        return f"grpc{'s' if self.secure else ''}://{self.authority}"

    @classmethod
    def parse(cls, text: str) -> Address:
        """Reads grpc://host:port or grpcs://host:port; the port is 50051 where it is left out.

        Raises SettingsError.
        """
        parts = urlsplit(text if "://" in text else f"grpc://{text}")
        try:
            port = parts.port or 50051
        except ValueError:
            port = 0
        if parts.scheme not in ("grpc", "grpcs") or not parts.hostname or not port or parts.path.strip("/"):
            raise SettingsError(f"{text} is no address of a daemon: write it as grpc://host:50051.")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        return cls(f"{host}:{port}", parts.scheme == "grpcs")


class Client:
    """One connection. Use as an async context manager."""

    def __init__(self, address: Address, api_key: str | None = None, certificate: Path | None = None) -> None:
        """`certificate` is a PEM file to trust besides the system's own, for grpcs. Raises SettingsError."""
        self._address = address
        self._metadata = [("authorization", f"Bearer {api_key}")] if api_key else []
        options = [
            ("grpc.max_receive_message_length", 64 * 2**20),
            # A daemon that restarts is back within seconds.
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 1000),
        ]
        if address.secure:
            try:
                roots = certificate.read_bytes() if certificate else None
            except OSError as error:
                raise SettingsError(f"The certificate {certificate} cannot be read: {error}.") from error
            credentials = grpc.ssl_channel_credentials(roots)
            self._channel = grpc.aio.secure_channel(address.authority, credentials, options)
        else:
            self._channel = grpc.aio.insecure_channel(address.authority, options)
        self._stub = engine_pb2_grpc.EngineStub(self._channel)

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._channel.close(None)

    async def serving(self) -> bool:
        """Whether health says SERVING. Raises Unavailable when nothing answers."""
        stub = health_pb2_grpc.HealthStub(self._channel)
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=_PATIENCE)
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from None
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def status(self) -> pb.GetStatusResponse:
        """The daemon's own account of itself. Raises KtdError."""
        try:
            return await self._stub.GetStatus(
                pb.GetStatusRequest(), metadata=self._metadata, timeout=_PATIENCE
            )
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from None

    async def models(self) -> list[pb.Model]:
        """The models it serves. Raises KtdError."""
        try:
            answer = await self._stub.ListModels(
                pb.ListModelsRequest(), metadata=self._metadata, timeout=_PATIENCE
            )
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from None
        return list(answer.models)

    async def chat(self, request: ChatRequest) -> AsyncGenerator[ChatEvent, None]:
        """As ChatService.chat; closing the generator cancels the call. An answer without an end raises
        EngineFailure.
        """
        call = self._stub.Chat(_to_proto(request), metadata=self._metadata)
        event: ChatEvent | None = None
        try:
            async for message in call:
                event = _from_proto(message)
                yield event
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from None
        finally:
            call.cancel()
        if not isinstance(event, Finished):
            raise EngineFailure(f"The answer broke off: {self._address.authority} did not end it.")

    def _error(self, error: grpc.aio.AioRpcError) -> KtdError:
        said, place = str(error.details()), self._address.authority
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return Unavailable(f"What listens on {place} does not answer: it is busy, or no ktd.")
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            return Unavailable(f"What listens on {place} is no ktd, or one of another version.")
        if error.code() is grpc.StatusCode.UNAVAILABLE and "connect" in said.lower():
            if "CERTIFICATE_VERIFY_FAILED" in said:
                said = f"The certificate of {place} is not trusted here, or is one for another name."
            elif any(mark in said for mark in _CONNECTED):
                said = (
                    f"What listens on {place} is no ktd, or one side uses TLS (grpcs://) and the other not."
                )
            else:
                said = f"Nothing answers on {place}: is the daemon running there?"
        return _ERRORS.get(error.code(), EngineFailure)(said)


def _to_proto(request: ChatRequest) -> pb.ChatRequest:
    """What `ktd chat` sets of a request."""
    sampling = request.sampling
    return pb.ChatRequest(
        messages=[
            pb.Message(role=m.role, content=m.content, reasoning_content=m.reasoning_content)
            for m in request.messages
        ],
        sampling=pb.Sampling(
            temperature=sampling.temperature, top_p=sampling.top_p, max_tokens=request.max_tokens
        ),
        thinking=request.thinking,
        request_id=request.request_id,
        priority=pb.PRIORITY_LOW if request.priority is Priority.LOW else pb.PRIORITY_NORMAL,
    )


def _from_proto(event: pb.ChatEvent) -> ChatEvent:
    match event.WhichOneof("event"):
        case "queued":
            return Queued(event.queued.position)
        case "prefill":
            return Prefill(event.prefill.done, event.prefill.total, event.prefill.tokens_per_second)
        case "reasoning":
            return Reasoning(event.reasoning.text)
        case "answer":
            return Answer(event.answer.text)
        case "tool_call":
            call = event.tool_call
            return ToolCall(call.id, call.name, call.arguments_json, call.index)
        case "usage":
            usage = event.usage
            return Usage(
                usage.prompt_tokens,
                usage.cached_tokens,
                usage.completion_tokens,
                usage.reasoning_tokens,
                Timings(usage.queue_seconds, usage.prefill_seconds, usage.decode_seconds),
            )
        case "finished" if event.finished.reason in _REASONS:
            return Finished(_REASONS[event.finished.reason])
    raise EngineFailure("The daemon speaks a newer version of the protocol: update ktd here.")
