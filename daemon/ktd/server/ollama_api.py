"""Ollama's API over the one model that is served: what its clients ask before and while they chat."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

import ktd
from ktd.chat.fields import json_object
from ktd.chat.ollama_request import OllamaRequest, from_chat, from_generate, model_name
from ktd.chat.request import RequestDefaults
from ktd.server.host import Host, State
from ktd.server.logprobs_json import token_objects
from ktd.server.reading import read
from ktd.server.responses import Json, WholeAnswer, body_of, guarded, peer_of, respond
from ktd.server.status import sentence_of, status_of
from ktd.types import Answer, ChatEvent, Finished, FinishReason, Reasoning, TokenLogprob, ToolCall, Usage

# The release whose API this is: clients ask, and refuse to talk to one that is too old for them.
API_VERSION = "0.12.11"
_NOT_HERE = {
    "/api/embed": "This model writes text and gives no embeddings.",
    "/api/embeddings": "This model writes text and gives no embeddings.",
    "/api/pull": "Models are not pulled through this API: run `ktd pull`, then `ktd serve --gguf-path`.",
    "/api/push": "Models are not pushed from here.",
    "/api/create": "Models are not created here: `ktd serve --gguf-path` serves a GGUF as it is.",
    "/api/copy": "The one model that is served is not copied.",
    "/api/delete": "The one model that is served is not deleted: its file is yours.",
}
_NEVER = "9999-12-31T23:59:59Z"

_Made = Callable[[bytes, RequestDefaults], OllamaRequest]


class OllamaApi:
    """Endpoints over one Host."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def routes(self) -> list[Route]:
        """Every path of the API."""
        return [
            Route("/", _root),
            Route("/api/version", _version),
            Route("/api/tags", self._tags),
            Route("/api/ps", self._ps),
            Route("/api/show", guarded(self._show, _error_response), methods=["POST"]),
            Route("/api/chat", guarded(self._chat, _error_response), methods=["POST"]),
            Route("/api/generate", guarded(self._generate, _error_response), methods=["POST"]),
            *(Route(path, _not_here, methods=["POST", "DELETE"]) for path in _NOT_HERE),
        ]

    async def _tags(self, request: Request) -> Response:
        return JSONResponse({"models": [self._model() | {"modified_at": self._modified_at()}]})

    async def _ps(self, request: Request) -> Response:
        served = self._host.served
        running = self._model() | {
            "expires_at": _NEVER,
            "size_vram": served.size_vram,
            "context_length": served.context,
        }
        return JSONResponse({"models": [running] if self._host.state is State.READY else []})

    async def _show(self, request: Request) -> Response:
        served = self._host.served
        body = await read(await body_of(request), json_object)
        served.check_name(model_name(body))
        sampling = self._host.defaults.sampling
        can = {"completion": True, "tools": served.takes_tools, "thinking": served.thinks}
        return JSONResponse(
            {
                "modelfile": f"FROM {served.file_name}",
                "parameters": f"temperature {sampling.temperature:g}\ntop_p {sampling.top_p:g}",
                "details": self._details(),
                "model_info": {
                    "general.architecture": served.architecture,
                    "general.parameter_count": served.parameters,
                    f"{served.architecture}.context_length": served.context,
                },
                "capabilities": [name for name, has in can.items() if has],
                "modified_at": self._modified_at(),
            }
        )

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, from_chat, _said_in_chat)

    async def _generate(self, request: Request) -> Response:
        return await self._answer(request, from_generate, _said_in_generate)

    async def _answer(self, request: Request, made: _Made, say: _Say) -> Response:
        defaults = self._host.defaults
        asked = await read(await body_of(request), lambda body: made(body, defaults))
        self._host.served.check_name(asked.model)
        writer = _Writer(self._name(), say)
        if asked.chat is None:
            return JSONResponse(writer.loaded())
        events = self._host.chat(asked.chat, peer_of(request))
        return await respond(request, events, writer, stream=asked.stream)

    def _name(self) -> str:
        """The served name with a tag, as Ollama's clients know models."""
        name = self._host.served.name
        return name if ":" in name else f"{name}:latest"

    def _model(self) -> Json:
        served = self._host.served
        # Ollama's is the sum of the weights, which would take minutes: here it says which file of which day.
        identity = f"{served.file_name} {served.size} {served.created}"
        return {
            "name": self._name(),
            "model": self._name(),
            "size": served.size,
            "digest": hashlib.sha256(identity.encode()).hexdigest(),
            "details": self._details(),
        }

    def _details(self) -> Json:
        served = self._host.served
        return {
            "parent_model": "",
            "format": "gguf",
            "family": served.architecture,
            "families": [served.architecture],
            "parameter_size": _parameter_size(served.parameters),
            "quantization_level": served.quantisation,
        }

    def _modified_at(self) -> str:
        return _timestamp(self._host.served.created)


def _said_in_chat(text: str, thought: str, calls: Sequence[ToolCall]) -> Json:
    message: Json = {"role": "assistant", "content": text}
    if thought:
        message["thinking"] = thought
    if calls:
        message["tool_calls"] = [
            {
                "id": call.id,
                "function": {
                    "index": call.index,
                    "name": call.name,
                    "arguments": json.loads(call.arguments),
                },
            }
            for call in calls
        ]
    return {"message": message}


def _said_in_generate(text: str, thought: str, calls: Sequence[ToolCall]) -> Json:
    return {"response": text, "thinking": thought} if thought else {"response": text}


def _logprobs(tokens: Sequence[TokenLogprob]) -> Json:
    """Ollama has one list for thought and answer, and none where it would be empty."""
    return {"logprobs": token_objects(tokens)} if tokens else {}


_Say = Callable[[str, str, Sequence[ToolCall]], Json]


class _Writer:
    """Says one answer as Ollama's objects, one a line; `say` puts text where the endpoint has it."""

    media_type = "application/x-ndjson"

    def __init__(self, model: str, say: _Say) -> None:
        self._model = model
        self._say = say
        self._began = time.monotonic()
        self._counts: Json = {}

    def loaded(self) -> Json:
        """The answer to a request without a question. Nothing is loaded or unloaded for it."""
        return self._object(self._say("", "", ()), done=True, done_reason="load")

    def whole(self, answer: WholeAnswer) -> Json:
        """The answer as one object."""
        said = self._say(answer.answer, answer.reasoning, answer.calls)
        said |= _logprobs([*answer.reasoning_tokens, *answer.answer_tokens])
        return self._last(said, answer.reason, self._figures(answer.usage))

    def opening(self) -> str:
        """Nothing: the first line is the first piece of text."""
        return ""

    def frame(self, event: ChatEvent) -> str:
        """A line, the last one with the counts."""
        match event:
            case Reasoning(text, tokens):
                return self._line(self._say("", text, ()) | _logprobs(tokens))
            case Answer(text, tokens):
                return self._line(self._say(text, "", ()) | _logprobs(tokens))
            case ToolCall():
                return self._line(self._say("", "", [event]))
            case Usage():
                self._counts = self._figures(event)
            case Finished(reason):
                return _json_line(self._last(self._say("", "", ()), reason, self._counts))
        return ""

    def quiet(self, event: ChatEvent) -> str:
        """An empty piece of the answer."""
        return self._line(self._say("", "", ()))

    def broken(self, error: Exception) -> str:
        """An error in the place of the last line."""
        return _json_line({"error": sentence_of(error)})

    def _line(self, said: Json) -> str:
        return _json_line(self._object(said, done=False))

    def _last(self, said: Json, reason: FinishReason, counts: Json) -> Json:
        # Ollama has no word of its own for an answer that ends with tool calls.
        done_reason = "length" if reason is FinishReason.LENGTH else "stop"
        return self._object(said, done=True, done_reason=done_reason) | counts

    def _object(self, said: Json, **more: object) -> Json:
        return {"model": self._model, "created_at": _timestamp(time.time()), **said, **more}

    def _figures(self, usage: Usage) -> Json:
        """Durations in nanoseconds. The model is loaded always: what is waited for is the queue."""
        timings = usage.timings
        return {
            "total_duration": round((time.monotonic() - self._began) * 1e9),
            "load_duration": round(timings.queue_seconds * 1e9),
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": round(timings.prefill_seconds * 1e9),
            "eval_count": usage.completion_tokens,
            "eval_duration": round(timings.decode_seconds * 1e9),
        }


async def _root(request: Request) -> Response:
    return PlainTextResponse("ktd is running")


async def _version(request: Request) -> Response:
    return JSONResponse({"version": API_VERSION, "ktd": ktd.__version__})


async def _not_here(request: Request) -> Response:
    return JSONResponse({"error": _NOT_HERE[request.url.path]}, 501)


def _error_response(error: Exception) -> Response:
    return JSONResponse({"error": sentence_of(error)}, status_of(error).http)


def _json_line(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")


def _parameter_size(parameters: int) -> str:
    for unit, letter in ((10**9, "B"), (10**6, "M")):
        if parameters >= unit:
            return f"{parameters / unit:.1f}{letter}"
    return str(parameters)
