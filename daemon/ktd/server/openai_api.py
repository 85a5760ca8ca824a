"""/v1/chat/completions and /v1/models as OpenAI's clients expect them, with DeepSeek's reasoning_content."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from ktd.chat.openai_request import Completion, from_openai
from ktd.errors import RequestError, UnknownModel
from ktd.server.host import Host
from ktd.server.status import sentence_of, status_of
from ktd.types import Answer, ChatEvent, Finished, Prefill, Queued, Reasoning, ToolCall, Usage

# As the gRPC door: a long conversation with documents in it.
MOST_BYTES = 64 * 2**20
# A comment line is sent when nothing else was for so long, so that proxies keep the connection in a long
# prefill.
COMMENT_SECONDS = 5.0

Json = dict[str, Any]
_Result = TypeVar("_Result")


class OpenAiApi:
    """Endpoints over one Host."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def models(self, request: Request) -> Response:
        """The list with the one model."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """The model by any name it answers to. Raises UnknownModel."""
        self._host.served.check_name(request.path_params["name"])
        return JSONResponse(self._model())

    def _model(self) -> Json:
        served = self._host.served
        return {
            "id": served.name,
            "object": "model",
            "created": served.created,
            "owned_by": "ktd",
            "context_length": served.context,
        }

    async def chat_completions(self, request: Request) -> Response:
        """One answer, streamed or whole."""
        try:
            return await self._complete(request)
        except ClientDisconnect:
            raise
        except Exception as error:  # every failure becomes an error object with a readable message
            return error_response(error)

    async def _complete(self, request: Request) -> Response:
        completion = from_openai(await _body(request), self._host.defaults)
        self._host.served.check_name(completion.model)
        writer = _Writer(self._host.served.name, completion)
        events = self._host.chat(completion.chat)
        if not completion.stream:
            return JSONResponse(await unless_disconnected(request.receive, writer.whole(events)))
        try:
            first = await unless_disconnected(request.receive, anext(events))
        except BaseException:
            await events.aclose()
            raise
        return EventStream(writer.frames(first, events))


async def _body(request: Request) -> bytes:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MOST_BYTES:
            raise RequestError(f"The body is larger than {MOST_BYTES >> 20} MiB.")
    return bytes(data)


class _Writer:
    """Writes the events of one answer as OpenAI's objects."""

    def __init__(self, model: str, completion: Completion) -> None:
        self._completion = completion
        self._usage_frame = ""
        self._head: Json = {"id": completion.chat.request_id, "created": int(time.time()), "model": model}

    async def whole(self, events: AsyncGenerator[ChatEvent, None]) -> Json:
        """The answer as one chat.completion object."""
        reasoning: list[str] = []
        answer: list[str] = []
        calls: list[Json] = []
        reason, usage = "", {}
        async with aclosing(events):
            async for event in events:
                match event:
                    case Reasoning(text):
                        reasoning.append(text)
                    case Answer(text):
                        answer.append(text)
                    case ToolCall():
                        calls.append(_tool_call(event))
                    case Usage():
                        usage = self._usage(event)
                    case Finished():
                        reason = event.reason.value
        message: Json = {"role": "assistant", "content": "".join(answer)}
        if reasoning:
            message["reasoning_content"] = "".join(reasoning)
        if calls:
            message["tool_calls"] = calls
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage}

    async def frames(
        self, first: ChatEvent, events: AsyncGenerator[ChatEvent, None]
    ) -> AsyncGenerator[str, None]:
        """Server-sent events, the last one [DONE], or an error object when the engine fails on the way."""
        async with aclosing(events):
            yield self._frame({"role": "assistant", "content": ""})
            told = time.monotonic()
            try:
                async for event in _chain(first, events):
                    frame = self._frame_of(event)
                    if not frame and time.monotonic() - told > COMMENT_SECONDS:
                        frame = f": {_progress(event)}\n\n"
                    if frame:
                        told = time.monotonic()
                        yield frame
            except Exception as error:  # the headers are sent: the stream itself must say it
                yield f"data: {json.dumps(error_body(error), ensure_ascii=False)}\n\n"
                return
            yield "data: [DONE]\n\n"

    def _frame_of(self, event: ChatEvent) -> str:
        match event:
            case Reasoning(text):
                return self._frame({"content": None, "reasoning_content": text})
            case Answer(text):
                return self._frame({"content": text})
            case ToolCall(index=index):
                return self._frame({"tool_calls": [{"index": index, **_tool_call(event)}]})
            case Usage() if self._completion.include_usage:
                self._usage_frame = self._chunk([], usage=self._usage(event))
            case Finished(reason):
                last = self._frame({}, reason.value)
                return last + self._usage_frame if self._completion.include_usage else last
        return ""

    def _frame(self, delta: Json, finish_reason: str | None = None) -> str:
        return self._chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}])

    def _chunk(self, choices: list[Json], **more: Json) -> str:
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": choices, **more}
        return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"

    def _usage(self, usage: Usage) -> Json:
        counts: Json = {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        }
        if self._completion.return_speed:
            counts["prefill_time"] = usage.timings.prefill_seconds
            counts["decode_time"] = usage.timings.decode_seconds
        return counts


def _tool_call(call: ToolCall) -> Json:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _progress(event: ChatEvent) -> str:
    match event:
        case Queued(position):
            return f"queued, {position} in front"
        case Prefill(done, total):
            return f"prefill {done}/{total}"
    return "working"


async def _chain(first: ChatEvent, rest: AsyncIterator[ChatEvent]) -> AsyncIterator[ChatEvent]:
    yield first
    async for event in rest:
        yield event


def error_body(error: Exception) -> Json:
    """OpenAI's error object."""
    status = status_of(error)
    param = "model" if isinstance(error, UnknownModel) else None
    return {
        "error": {"message": sentence_of(error), "type": status.type, "param": param, "code": status.code}
    }


def error_response(error: Exception, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The answer to a request that failed before its first byte."""
    return JSONResponse(error_body(error), status_of(error).http, headers)


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


class EventStream(Response):
    """Sends frames as they come; a client that leaves ends them at once, also while none comes."""

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncGenerator[str, None]) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
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
