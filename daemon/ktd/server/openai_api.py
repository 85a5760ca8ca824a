"""/v1/chat/completions and /v1/models as OpenAI's clients expect them, with DeepSeek's reasoning_content."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ktd.chat.openai_request import Completion, from_openai
from ktd.errors import UnknownModel
from ktd.server.host import Host
from ktd.server.logprobs_json import token_objects
from ktd.server.reading import read
from ktd.server.responses import Json, WholeAnswer, body_of, peer_of, respond
from ktd.server.status import sentence_of, status_of
from ktd.types import Answer, ChatEvent, Finished, Prefill, Queued, Reasoning, TokenLogprob, ToolCall, Usage


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
        """One answer, streamed or whole. Raises what is wrong before its first byte."""
        defaults = self._host.defaults
        completion = await read(await body_of(request), lambda body: from_openai(body, defaults))
        self._host.served.check_name(completion.model)
        events = self._host.chat(completion.chat, peer_of(request))
        writer = _Writer(self._host.served.name, completion)
        return await respond(request, events, writer, stream=completion.stream)


class _Writer:
    """Says one answer as OpenAI's objects."""

    media_type = "text/event-stream"

    def __init__(self, model: str, completion: Completion) -> None:
        self._completion = completion
        self._usage_frame = ""
        self._head: Json = {"id": completion.chat.request_id, "created": int(time.time()), "model": model}

    def whole(self, answer: WholeAnswer) -> Json:
        """The answer as one chat.completion object."""
        message: Json = {"role": "assistant", "content": answer.answer}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.calls:
            message["tool_calls"] = [_tool_call(call) for call in answer.calls]
        logprobs = None
        if self._completion.chat.sampling.top_logprobs is not None:
            logprobs = _logprobs(answer.answer_tokens, answer.reasoning_tokens)
        reason = answer.reason.value
        choice = {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": reason}
        usage = self._usage(answer.usage)
        return {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage}

    def opening(self) -> str:
        """The role alone, as OpenAI begins."""
        return self._frame({"role": "assistant", "content": ""})

    def frame(self, event: ChatEvent) -> str:
        """A server-sent event, and the last three together."""
        match event:
            case Reasoning(text, tokens):
                logprobs = _logprobs(None, tokens) if tokens else None
                return self._frame({"content": None, "reasoning_content": text}, logprobs=logprobs)
            case Answer(text, tokens):
                return self._frame({"content": text}, logprobs=_logprobs(tokens) if tokens else None)
            case ToolCall(index=index):
                return self._frame({"tool_calls": [{"index": index, **_tool_call(event)}]})
            case Usage() if self._completion.include_usage:
                self._usage_frame = self._chunk([], usage=self._usage(event))
            case Finished(reason):
                return f"{self._frame({}, finish_reason=reason.value)}{self._usage_frame}data: [DONE]\n\n"
        return ""

    def quiet(self, event: ChatEvent) -> str:
        """A comment, which clients skip."""
        return f": {_progress(event)}\n\n"

    def broken(self, error: Exception) -> str:
        """An error object in the place of a chunk."""
        return f"data: {json.dumps(error_body(error), ensure_ascii=False)}\n\n"

    def _frame(self, delta: Json, *, logprobs: Json | None = None, finish_reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._chunk([choice])

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


def _logprobs(
    content: Sequence[TokenLogprob] | None, reasoning: Sequence[TokenLogprob] | None = None
) -> Json:
    """OpenAI's object, with the thought's tokens where DeepSeek puts them."""
    logprobs: Json = {"content": None if content is None else token_objects(content), "refusal": None}
    if reasoning:
        logprobs["reasoning_content"] = token_objects(reasoning)
    return logprobs


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


def error_body(error: Exception) -> Json:
    """OpenAI's error object."""
    status = status_of(error)
    param = "model" if isinstance(error, UnknownModel) else None
    return {
        "error": {"message": sentence_of(error), "type": status.type, "param": param, "code": status.code}
    }


def error_response(error: Exception) -> JSONResponse:
    """The answer to a request that failed before its first byte."""
    return JSONResponse(error_body(error), status_of(error).http)
