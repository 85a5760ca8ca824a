"""OpenAI's chat completion requests, with the fields that DeepSeek, vLLM and KTransformers added."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
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
    MOST_BIASES,
    MOST_MESSAGES,
    RANGES,
    RequestDefaults,
    at_most,
    checked,
    new_request_id,
)
from ktd.errors import RequestError
from ktd.types import AnswerSchema, ChatRequest, Message, Priority, ToolCall

# Fields that change nothing here, and that clients send all the same.
_WITHOUT_EFFECT = {
    "metadata", "store", "service_tier", "prompt_cache_key", "verbosity", "num_ctx",
}  # fmt: skip
_NUMBERS = {**{name: name for name in RANGES}, "repeat_penalty": "repetition_penalty"}
_WHOLE = {"top_k", "seed", "top_logprobs"}
_KNOWN = {
    "model", "messages", "stream", "stream_options", "max_tokens", "max_completion_tokens", "stop", "n",
    "logit_bias", "tools", "tool_choice", "response_format", "thinking", "chat_template_kwargs",
    "continue_final_message", "return_speed", "functions", "logprobs", "parallel_tool_calls",
    "reasoning_effort", "modalities", "web_search_options", "user", "safety_identifier", *_NUMBERS,
    *_WITHOUT_EFFECT,
}  # fmt: skip
# Looking for what a name may have meant takes time in the event loop, which is everybody's.
_MOST_UNKNOWN = 100
_LONGEST_GUESSED = 64
_LONGEST_TOKEN_ID = 10


@dataclass(frozen=True, slots=True)
class Completion:
    """A checked request and how its answer is to be written."""

    model: str
    chat: ChatRequest
    stream: bool
    include_usage: bool
    return_speed: bool


def from_openai(data: bytes, defaults: RequestDefaults) -> Completion:
    """Reads and checks the body of a request. Raises RequestError with the first thing that is wrong."""
    body = json_object(data)
    _refuse_misspelt(body)
    _refuse_unsupported(body)
    messages = [
        _message(number, item) for number, item in enumerate(list_of(body, "messages", MOST_MESSAGES))
    ]
    # OpenAI has no flag for it; a client that ends with the assistant's words wants them continued.
    continued = messages[-1].role == "assistant" if messages else False
    options = object_of(body, "stream_options")
    must_call, named = _tool_choice(body)
    tools = [] if body.get("tool_choice") == "none" else tools_of(body)
    if named is not None:
        tools = [tool for tool in tools if tool.name == named]
    return Completion(
        model=text_of(body.get("model", ""), "model"),
        chat=checked(
            request_id=new_request_id("chatcmpl"),
            messages=messages,
            sampling=_sampling(body),
            logit_bias=_logit_bias(body),
            max_tokens=_max_tokens(body),
            stop=stop_of(body),
            thinking=_thinking(body),
            continue_final_message=flag_of(body, "continue_final_message", continued),
            priority=Priority.NORMAL,
            tools=tools,
            schema=_schema(object_of(body, "response_format")),
            parallel_tool_calls=flag_of(body, "parallel_tool_calls", True) and named is None,
            must_call=must_call,
            client=_user(body),
            defaults=defaults,
        ),
        stream=flag_of(body, "stream", False),
        include_usage=flag_of(options, "include_usage", False),
        return_speed=flag_of(body, "return_speed", False),
    )


def _refuse_misspelt(body: Mapping[str, Any]) -> None:
    """An unknown field may be another server's; one that is nearly a known field is a mistake."""
    unknown = body.keys() - _KNOWN
    if len(unknown) > _MOST_UNKNOWN:
        raise RequestError(f"The body has {len(unknown)} unknown fields: leave them out.")
    for name in unknown:
        if len(name) > _LONGEST_GUESSED:
            continue
        if close := difflib.get_close_matches(name, _KNOWN, n=1, cutoff=0.85):
            raise RequestError(f"The field {name} is unknown: did you mean {close[0]}?")


def _refuse_unsupported(body: Mapping[str, Any]) -> None:
    if body.get("n", 1) != 1:
        raise RequestError("n must be 1: ask several times for several answers.")
    if body.get("functions"):
        raise RequestError("functions is OpenAI's old form, which is not supported: send them as tools.")
    if body.get("modalities", ["text"]) != ["text"]:
        raise RequestError('modalities must be ["text"]: this model writes text only.')
    if "web_search_options" in body:
        raise RequestError("web_search_options is not supported: this model searches nothing by itself.")


def _tool_choice(body: Mapping[str, Any]) -> tuple[bool, str | None]:
    """Whether a tool must be called, and which if it is named: then no other is offered."""
    choice = body.get("tool_choice", "auto")
    if choice in ("auto", "none", "required"):
        return choice == "required", None
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise RequestError('tool_choice must be "auto", "none", "required" or name a function.')
    if all(tool.name != name for tool in tools_of(body)):
        raise RequestError(f'tool_choice names "{name[:64]}", which is not among the tools.')
    return True, name


def _sampling(body: Mapping[str, Any]) -> dict[str, float]:
    given = {to: number_of(body, name, whole=to in _WHOLE) for name, to in _NUMBERS.items() if name in body}
    if (seed := given.get("seed", 0)) < 0:  # OpenAI's have a sign
        given["seed"] = seed % 2**64
    if flag_of(body, "logprobs", False):
        given.setdefault("top_logprobs", 0)
    elif given.pop("top_logprobs", 0):
        raise RequestError("top_logprobs is set without logprobs: set logprobs to true.")
    return given


def _message(number: int, item: object) -> Message:
    where = f"messages[{number}]"
    if not isinstance(item, dict):
        raise RequestError(f"{where} is not a JSON object.")
    role = text_of(item.get("role", ""), f"{where}.role")
    calls = item.get("tool_calls") or []
    if not isinstance(calls, list):
        raise RequestError(f"{where}.tool_calls is not a list.")
    at_most(MOST_MESSAGES, len(calls), f"calls in {where}")
    return Message(
        role="system" if role == "developer" else role,
        content=_content(item.get("content"), where),
        reasoning_content=text_of(item.get("reasoning_content") or "", f"{where}.reasoning_content"),
        tool_calls=[_tool_call(index, call, where) for index, call in enumerate(calls)],
        tool_call_id=text_of(item.get("tool_call_id") or "", f"{where}.tool_call_id"),
    )


def _content(content: object, where: str) -> str:
    if content is None:
        return ""
    if not isinstance(content, list):
        return text_of(content, f"{where}.content")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise RequestError(f"{where} holds a part of type {kind}: this model reads text only.")
        texts.append(text_of(part.get("text"), f"{where}.content"))
    return "\n".join(texts)


def _tool_call(index: int, call: object, where: str) -> ToolCall:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        raise RequestError(f"{where}.tool_calls[{index}] is no function call.")
    return ToolCall(
        id=text_of(call.get("id") or "", f"{where}.tool_calls[{index}].id"),
        name=text_of(function.get("name"), f"{where}.tool_calls[{index}].function.name"),
        arguments=text_of(function.get("arguments"), f"{where}.tool_calls[{index}].function.arguments"),
        index=index,
    )


def _schema(wanted: Mapping[str, Any]) -> AnswerSchema | None:
    """OpenAI's response_format, or llama-server's with the schema beside the type."""
    kind = wanted.get("type", "text")
    if kind == "text":
        return None
    if kind not in ("json_object", "json_schema"):
        raise RequestError(
            'The type of response_format is not supported: it must be "text", "json_object" or "json_schema".'
        )
    given = object_of(wanted, "json_schema") if "json_schema" in wanted else wanted
    schema = given.get("schema")
    if schema is None and kind == "json_object":
        return ANY_OBJECT
    if schema is None:
        raise RequestError("response_format has no schema: send it as json_schema.schema, a JSON object.")
    return AnswerSchema(schema_of(schema, "The schema of response_format"), given.get("strict") is False)


def _thinking(body: Mapping[str, Any]) -> bool | None:
    """DeepSeek's `{"type": "enabled"}`, a plain boolean, vLLM's template argument, or OpenAI's effort "none".

    Of the other efforts the model knows nothing: how long it thinks is its own decision.
    """
    value = body.get("thinking")
    if value is None:
        arguments = object_of(body, "chat_template_kwargs")
        value = arguments.get("thinking", arguments.get("enable_thinking"))
        if value is None and body.get("reasoning_effort") == "none":
            value = False
    if isinstance(value, dict):
        value = {"enabled": True, "disabled": False}.get(str(value.get("type")), value)
    if value is not None and not isinstance(value, bool):
        raise RequestError('thinking must be true, false, {"type": "enabled"} or {"type": "disabled"}.')
    return value


def _logit_bias(body: Mapping[str, Any]) -> dict[int, float]:
    given = object_of(body, "logit_bias")
    at_most(MOST_BIASES, len(given), "tokens in logit_bias")
    if not all(token.isdecimal() and len(token) <= _LONGEST_TOKEN_ID for token in given):
        raise RequestError("A key of logit_bias is no token id: keys are numbers of tokens.")
    return {int(token): number_of(given, token, whole=False) for token in given}


def _user(body: Mapping[str, Any]) -> str:
    """Who asks, under OpenAI's newer name or its older one."""
    names = (body.get("safety_identifier"), body.get("user"))
    return next((name for name in names if isinstance(name, str)), "")


def _max_tokens(body: Mapping[str, Any]) -> int | None:
    name = "max_completion_tokens" if "max_completion_tokens" in body else "max_tokens"
    return int(number_of(body, name, whole=True)) if name in body else None
