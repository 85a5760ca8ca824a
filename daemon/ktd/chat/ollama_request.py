"""Ollama's requests: /api/chat and /api/generate."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ktd.chat.fields import (
    flag_of,
    json_object,
    list_of,
    number_of,
    object_of,
    schema_of,
    stop_of,
    text_of,
    tools_of,
)
from ktd.chat.request import (
    ANY_OBJECT,
    MOST_MESSAGES,
    RANGES,
    RequestDefaults,
    at_most,
    checked,
    new_request_id,
)
from ktd.errors import RequestError
from ktd.types import AnswerSchema, ChatRequest, Message, Priority, Tool, ToolCall

_TAG = ":latest"
# Options that have a counterpart here, by its name. Others are of Ollama's own runner: they change nothing.
_OPTIONS = {**{name: name for name in RANGES}, "repeat_penalty": "repetition_penalty"}
del _OPTIONS["top_logprobs"]  # which stands beside them
_WHOLE = {"top_k", "seed"}
_LEVELS = ("low", "medium", "high", "max")
# What a prompt of /api/generate may come with in Ollama, and why it cannot here.
_NOT_GENERATED = {
    "raw": "raw prompts are not supported: send the prompt without, or the conversation to /api/chat.",
    "suffix": "suffix is not supported: this model does not fill gaps.",
    "template": "template is not supported: the model's own is used.",
    "context": "context is not supported: send the conversation to /api/chat.",
    "images": "images are not supported: this model reads text only.",
}


@dataclass(frozen=True, slots=True)
class OllamaRequest:
    """A checked request. Without `chat` it asks only that the model be loaded."""

    model: str
    chat: ChatRequest | None
    stream: bool


def model_name(body: Mapping[str, Any]) -> str:
    """The model that is asked for, without the tag that Ollama adds to names without one."""
    return text_of(body.get("model", body.get("name", "")), "model").removesuffix(_TAG)


def from_chat(data: bytes, defaults: RequestDefaults) -> OllamaRequest:
    """Reads and checks a body of /api/chat. Raises RequestError with the first thing that is wrong."""
    body = json_object(data)
    messages = _messages(list_of(body, "messages", MOST_MESSAGES))
    return _request(body, messages, tools_of(body), defaults)


def from_generate(data: bytes, defaults: RequestDefaults) -> OllamaRequest:
    """Reads and checks a body of /api/generate: a conversation of one question. Raises RequestError."""
    body = json_object(data)
    for name, sentence in _NOT_GENERATED.items():
        if body.get(name):
            raise RequestError(sentence)
    system, prompt = (text_of(body.get(name, ""), name) for name in ("system", "prompt"))
    messages = [Message("system", system)] if system and prompt else []
    if prompt:
        messages.append(Message("user", prompt))
    return _request(body, messages, (), defaults)


def _request(
    body: Mapping[str, Any], messages: Sequence[Message], tools: Sequence[Tool], defaults: RequestDefaults
) -> OllamaRequest:
    model, stream = model_name(body), flag_of(body, "stream", True)
    options = {name: value for name, value in object_of(body, "options").items() if value is not None}
    if not messages:
        return OllamaRequest(model, None, stream)
    chat = checked(
        request_id=new_request_id("ollama"),
        messages=messages,
        sampling=_sampling(options) | _logprobs(body),
        logit_bias={},
        max_tokens=_num_predict(options),
        stop=stop_of(options),
        thinking=_think(body.get("think")),
        continue_final_message=messages[-1].role == "assistant",
        priority=Priority.NORMAL,
        tools=tools,
        schema=_schema(body),
        defaults=defaults,
    )
    return OllamaRequest(model, chat, stream)


def _sampling(options: Mapping[str, Any]) -> dict[str, float]:
    sampling = {}
    for name, to in _OPTIONS.items():
        if name in options:
            value = number_of(options, name, whole=name in _WHOLE)
            if name != "seed" or value != -1:  # which is Ollama's "any"
                sampling[to] = RANGES[to].check(name, value)
    return sampling


def _logprobs(body: Mapping[str, Any]) -> dict[str, float]:
    count = number_of(body, "top_logprobs", whole=True) if "top_logprobs" in body else 0
    RANGES["top_logprobs"].check("top_logprobs", count)
    return {"top_logprobs": count} if flag_of(body, "logprobs", False) else {}


def _schema(body: Mapping[str, Any]) -> AnswerSchema | None:
    """Without a switch for it, what cannot be enforced is ignored, as in Ollama."""
    wanted = body.get("format")
    if isinstance(wanted, str):
        if wanted not in ("", "json"):
            raise RequestError('format must be "json" or a JSON schema.')
        return ANY_OBJECT if wanted else None
    return AnswerSchema(schema_of(wanted, "format"), lenient=True) if wanted else None


def _num_predict(options: Mapping[str, Any]) -> int | None:
    """-1 and -2 are Ollama's "until it ends" and "until the context is full": the same here."""
    if "num_predict" not in options:
        return None
    number = int(number_of(options, "num_predict", whole=True))
    if number < -2 or number == 0:
        raise RequestError(f"num_predict is {number}, but must be at least 1, or -1 for no limit.")
    return number if number > 0 else None


def _think(value: object) -> bool | None:
    """A level asks for a thought; how long it gets is the model's own decision."""
    if value is None or isinstance(value, bool):
        return value
    if value not in _LEVELS:
        raise RequestError(f"think must be true, false or one of {', '.join(_LEVELS)}.")
    return True


def _messages(items: Sequence[object]) -> list[Message]:
    """Gives calls and their results the ids that Ollama leaves out: some templates print them."""
    messages = []
    unanswered: list[ToolCall] = []
    count = 0
    for number, item in enumerate(items):
        where = f"messages[{number}]"
        if not isinstance(item, dict):
            raise RequestError(f"{where} is not a JSON object.")
        if item.get("images"):
            raise RequestError(f"{where} holds images: this model reads text only.")
        role = text_of(item.get("role", ""), f"{where}.role")
        calls = item.get("tool_calls") or []
        if not isinstance(calls, list):
            raise RequestError(f"{where}.tool_calls is not a list.")
        at_most(MOST_MESSAGES, count + len(calls), "tool calls")
        called = [_tool_call(call, f"{where}.tool_calls[{i}]", count + i) for i, call in enumerate(calls)]
        count += len(called)
        unanswered += called
        messages.append(
            Message(
                role=role,
                content=text_of(item.get("content") or "", f"{where}.content"),
                reasoning_content=text_of(item.get("thinking") or "", f"{where}.thinking"),
                tool_calls=called,
                tool_call_id=_answered(item, where, unanswered) if role == "tool" else "",
            )
        )
    return messages


def _tool_call(call: object, where: str, count: int) -> ToolCall:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        raise RequestError(f"{where} is no function call.")
    name = text_of(function.get("name"), f"{where}.function.name")
    try:
        arguments = json.dumps(object_of(function, "arguments"), ensure_ascii=False)
    except RecursionError:
        raise RequestError(f"The arguments of {where} are nested too deeply.") from None
    # In the form of Kimi-K2's, the one model that reads them.
    made_up = f"functions.{name}:{count}"
    return ToolCall(text_of(call.get("id") or made_up, f"{where}.id"), name, arguments, count)


def _answered(item: Mapping[str, Any], where: str, unanswered: list[ToolCall]) -> str:
    """The id of the call whose result `item` is; takes it off `unanswered`."""
    given = text_of(item.get("tool_call_id") or "", f"{where}.tool_call_id")
    name = text_of(item.get("tool_name") or "", f"{where}.tool_name")
    for call in unanswered:
        if (call.id == given) if given else (not name or call.name == name):
            unanswered.remove(call)
            return call.id
    return given
