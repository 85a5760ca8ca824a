"""What the HTTP APIs share: reading a body, gathering an answer or streaming it, clients that leave."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ktd.errors import RequestError
from ktd.types import Answer, ChatEvent, Finished, FinishReason, Reasoning, TokenLogprob, ToolCall, Usage

# As the gRPC door: ten times the text that the longest contexts hold. Reading it takes memory many times as
# large.
MOST_BYTES = 16 * 2**20
# Something is sent when there was nothing to say for so long, so that proxies keep the connection in a long
# prefill.
QUIET_SECONDS = 5.0

Json = dict[str, Any]
Endpoint = Callable[[Request], Awaitable[Response]]
_Result = TypeVar("_Result")


def guarded(endpoint: Endpoint, refuse: Callable[[Exception], Response]) -> Endpoint:
    """`endpoint`, whose every failure becomes an answer of its API, made by `refuse`."""

    async def answer(request: Request) -> Response:
        try:
            return await endpoint(request)
        except ClientDisconnect:
            raise
        except Exception as error:  # whatever it is, the client is told
            return refuse(error)

    return answer


async def body_of(request: Request) -> bytes:
    """The body of a request. Raises RequestError when it is too large, ClientDisconnect."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MOST_BYTES:
            raise RequestError(f"The body is larger than {MOST_BYTES >> 20} MiB.")
    return bytes(data)


def peer_of(request: Request) -> str:
    """Whose request it is where it does not say so: its machine's, as a client opens many connections."""
    return request.client.host if request.client else ""


@dataclass(frozen=True, slots=True)
class WholeAnswer:
    """Everything that was said in one answer; the tokens of it where they are asked for."""

    reasoning: str
    answer: str
    calls: list[ToolCall]
    usage: Usage
    reason: FinishReason
    reasoning_tokens: list[TokenLogprob]
    answer_tokens: list[TokenLogprob]


async def gather(events: AsyncGenerator[ChatEvent, None]) -> WholeAnswer:
    """The answer of `events`, which are closed. Raises what they raise."""
    reasoning: list[str] = []
    answer: list[str] = []
    reasoning_tokens: list[TokenLogprob] = []
    answer_tokens: list[TokenLogprob] = []
    calls: list[ToolCall] = []
    usage: Usage | None = None
    reason: FinishReason | None = None
    async with aclosing(events):
        async for event in events:
            match event:
                case Reasoning(text, tokens):
                    reasoning.append(text)
                    reasoning_tokens += tokens
                case Answer(text, tokens):
                    answer.append(text)
                    answer_tokens += tokens
                case ToolCall():
                    calls.append(event)
                case Usage():
                    usage = event
                case Finished():
                    reason = event.reason
    assert usage  # an answer that does not end with both raises
    assert reason
    return WholeAnswer(
        "".join(reasoning), "".join(answer), calls, usage, reason, reasoning_tokens, answer_tokens
    )


class Writer(Protocol):
    """Says one answer in the words of one API. A frame may be empty: then nothing is sent."""

    media_type: str

    def whole(self, answer: WholeAnswer) -> Json:
        """The answer as one object."""

    def opening(self) -> str:
        """The frame before the first event."""

    def frame(self, event: ChatEvent) -> str:
        """The frame of one event; that of Finished ends the stream."""

    def quiet(self, event: ChatEvent) -> str:
        """A frame that only keeps the connection alive."""

    def broken(self, error: Exception) -> str:
        """The frame that ends a stream whose answer failed: the headers are sent already."""


async def respond(
    request: Request, events: AsyncGenerator[ChatEvent, None], writer: Writer, *, stream: bool
) -> Response:
    """One answer, streamed or whole. A client that leaves ends it.

    Raises what `events` raise before anything was sent, and ClientDisconnect.
    """
    if not stream:
        answer = await unless_disconnected(request.receive, gather(events))
        return JSONResponse(writer.whole(answer))
    first = await unless_disconnected(request.receive, anext(events))
    return _Stream(_frames(first, events, writer), writer.media_type)


async def _frames(
    first: ChatEvent, events: AsyncGenerator[ChatEvent, None], writer: Writer
) -> AsyncGenerator[str, None]:
    async with aclosing(events):
        if opening := writer.opening():
            yield opening
        told = time.monotonic()
        try:
            async for event in _chain(first, events):
                frame = writer.frame(event)
                if not frame and time.monotonic() - told > QUIET_SECONDS:
                    frame = writer.quiet(event)
                if frame:
                    told = time.monotonic()
                    yield frame
        except Exception as error:  # whatever it is, the client is told
            yield writer.broken(error)


async def _chain(first: ChatEvent, rest: AsyncIterator[ChatEvent]) -> AsyncIterator[ChatEvent]:
    yield first
    async for event in rest:
        yield event


async def unless_disconnected(receive: Receive, work: Awaitable[_Result]) -> _Result:
    """The result of `work`, which is cancelled when the client leaves; then raises ClientDisconnect."""
    task = asyncio.ensure_future(work)
    left = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, left}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for future in (task, left):
            future.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Stream(Response):
    """Sends frames as they come; a client that leaves ends them at once, also while none comes."""

    def __init__(self, frames: AsyncGenerator[str, None], media_type: str) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(headers=headers, media_type=media_type)
        del self.headers["content-length"]
        self._frames = frames

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with suppress(ClientDisconnect):
            await unless_disconnected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        async with aclosing(self._frames) as frames:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for frame in frames:
                await send({"type": "http.response.body", "body": frame.encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
