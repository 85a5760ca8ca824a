"""Checks chat requests where they enter. What is wrong is refused with a sentence, never bent into range."""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ktd.errors import RequestError
from ktd.text.conversation import MOST_NESTED
from ktd.types import AnswerSchema, ChatRequest, Message, Priority, SamplingParams, Tool, ToolCall
from ktd_proto.v1 import engine_pb2 as pb

ROLES = ("system", "user", "assistant", "tool")
# Others wait while a request is read: what it holds is counted before it is looked at.
MOST_MESSAGES = 8_192  # with the tool calls in them
MOST_TOOLS = 1_024
MOST_TOOL_TEXT = 512 << 10
MOST_BIASES = 1 << 18  # the largest vocabularies have 163,840 tokens
MOST_STOPS = 16
# Every stop string is looked for at every token.
LONGEST_STOP = 256
MOST_REQUEST_ID = 128
MOST_SCHEMA = 64 << 10  # nobody else runs while one is parsed or written
ANY_OBJECT = AnswerSchema('{"type": "object"}')
# As a 32-bit float, which is what gRPC carries. Less would overflow the logits.
_LEAST_PENALTY = 0.009999999776482582


@dataclass(frozen=True, slots=True)
class RequestDefaults:
    """What a request that leaves a field out gets; the daemon's settings fill it."""

    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    thinking: bool | None = None


@dataclass(frozen=True, slots=True)
class _Range:
    low: float
    high: float
    low_excluded: bool = False

    def check(self, name: str, value: float) -> float:
        above = value > self.low if self.low_excluded else value >= self.low
        if not (math.isfinite(value) and above and value <= self.high):
            low = f"above {self.low:g}" if self.low_excluded else f"from {self.low:g}"
            high = f" to {self.high:g}" if math.isfinite(self.high) else ""
            raise RequestError(f"{name} is {value:g}, but must be a number {low}{high}.")
        return value


# As engine.proto documents them.
RANGES = {
    "temperature": _Range(0, 5),
    "top_p": _Range(0, 1, low_excluded=True),
    "top_k": _Range(0, 2**32 - 1),
    "min_p": _Range(0, 1),
    "repetition_penalty": _Range(_LEAST_PENALTY, 100),
    "presence_penalty": _Range(-2, 2),
    "frequency_penalty": _Range(-2, 2),
    "seed": _Range(0, 2**64 - 1),
    "top_logprobs": _Range(0, 20),
}
_LOGIT_BIAS = _Range(-100, 100)


def from_proto(request: pb.ChatRequest, defaults: RequestDefaults) -> ChatRequest:
    """A checked request from the wire. The model's name is checked by the served model. Raises
    RequestError.
    """
    given = request.sampling
    at_most(MOST_MESSAGES, len(request.messages), "messages")
    at_most(MOST_MESSAGES, sum(len(message.tool_calls) for message in request.messages), "tool calls")
    at_most(MOST_TOOLS, len(request.tools), "tools")
    at_most(MOST_BIASES, len(given.logit_bias), "tokens in logit_bias")
    at_most(MOST_STOPS, len(given.stop), "stop strings")
    names = [name for name in RANGES if given.HasField(name)]  # type: ignore[arg-type]
    messages = [
        Message(
            role=message.role,
            content=message.content,
            reasoning_content=message.reasoning_content,
            tool_calls=[ToolCall(c.id, c.name, c.arguments_json, c.index) for c in message.tool_calls],
            tool_call_id=message.tool_call_id,
        )
        for message in request.messages
    ]
    return checked(
        request_id=request.request_id or new_request_id("chat"),
        messages=messages,
        sampling={name: getattr(given, name) for name in names},
        logit_bias=given.logit_bias,
        max_tokens=given.max_tokens if given.HasField("max_tokens") else None,
        stop=list(given.stop),
        thinking=request.thinking if request.HasField("thinking") else None,
        continue_final_message=request.continue_final_message,
        priority=Priority.LOW if request.priority == pb.PRIORITY_LOW else Priority.NORMAL,
        tools=[Tool(tool.name, tool.description, tool.parameters_json) for tool in request.tools],
        schema=_schema(request),
        parallel_tool_calls=request.parallel_tool_calls or not request.HasField("parallel_tool_calls"),
        must_call=request.must_call,
        client=request.user,
        defaults=defaults,
    )


def _schema(request: pb.ChatRequest) -> AnswerSchema | None:
    match request.WhichOneof("response_format"):
        case "json_object":
            return ANY_OBJECT
        case "json_schema":
            return AnswerSchema(request.json_schema.schema_json, request.json_schema.lenient)
    return None


def at_most(most: int, count: int, what: str) -> None:
    """Raises RequestError when the request holds more than `most` of `what`."""
    if count > most:
        raise RequestError(f"There are {count} {what}, but at most {most} are allowed.")


def new_request_id(prefix: str) -> str:
    """An id for a request whose client chose none."""
    return f"{prefix}-{uuid.uuid4().hex}"


def checked(
    *,
    request_id: str,
    messages: Sequence[Message],
    sampling: Mapping[str, float],
    logit_bias: Mapping[int, float],
    max_tokens: int | None,
    stop: Sequence[str],
    thinking: bool | None,
    continue_final_message: bool,
    priority: Priority,
    tools: Sequence[Tool],
    schema: AnswerSchema | None,
    defaults: RequestDefaults,
    parallel_tool_calls: bool = True,
    must_call: bool = False,
    client: str = "",
) -> ChatRequest:
    """The rules that hold for requests from anywhere. `sampling` holds the fields that were given.

    Raises RequestError with the first thing that is wrong.
    """
    if len(request_id) > MOST_REQUEST_ID or not request_id.isprintable():
        raise RequestError(f"The request id must be at most {MOST_REQUEST_ID} printable characters.")
    _check_messages(messages, continue_final_message)
    _check_tools(tools)
    if must_call and not tools:
        raise RequestError("A tool must be called, but the request has no tools.")
    if schema:
        _check_schema(schema.schema)
    if max_tokens is not None and max_tokens < 1:
        raise RequestError(f"max_tokens is {max_tokens}, but must be at least 1; leave it out for no limit.")
    at_most(MOST_STOPS, len(stop), "stop strings")
    if not all(stop):
        raise RequestError("A stop string is empty: it would end every answer at once.")
    if len(longest := max(stop, key=len, default="")) > LONGEST_STOP:
        raise RequestError(
            f"A stop string has {len(longest)} characters, but may have {LONGEST_STOP} at most."
        )
    return ChatRequest(
        request_id=request_id,
        messages=messages,
        sampling=_sampling(sampling, logit_bias, defaults.sampling),
        max_tokens=defaults.max_tokens if max_tokens is None else max_tokens,
        stop=stop,
        thinking=defaults.thinking if thinking is None else thinking,
        continue_final_message=continue_final_message,
        priority=priority,
        tools=tools,
        schema=schema,
        parallel_tool_calls=parallel_tool_calls,
        must_call=must_call,
        client=client,
    )


def _sampling(
    given: Mapping[str, float], logit_bias: Mapping[int, float], defaults: SamplingParams
) -> SamplingParams:
    values = {name: RANGES[name].check(name, value) for name, value in given.items()}
    bias = {int(t): _LOGIT_BIAS.check(f"logit_bias of token {t}", b) for t, b in logit_bias.items()}
    seed = values.get("seed", defaults.seed)
    top_logprobs = values.get("top_logprobs", defaults.top_logprobs)
    return SamplingParams(
        temperature=values.get("temperature", defaults.temperature),
        top_p=values.get("top_p", defaults.top_p),
        top_k=int(values.get("top_k", defaults.top_k)),
        min_p=values.get("min_p", defaults.min_p),
        repetition_penalty=values.get("repetition_penalty", defaults.repetition_penalty),
        presence_penalty=values.get("presence_penalty", defaults.presence_penalty),
        frequency_penalty=values.get("frequency_penalty", defaults.frequency_penalty),
        seed=None if seed is None else int(seed),
        logit_bias=bias,
        top_logprobs=None if top_logprobs is None else int(top_logprobs),
    )


def _check_messages(messages: Sequence[Message], continue_final_message: bool) -> None:
    if not messages:
        raise RequestError("The request has no messages: send at least one from the user.")
    parts = len(messages) + sum(len(message.tool_calls) for message in messages)
    at_most(MOST_MESSAGES, parts, "messages and tool calls")
    for number, message in enumerate(messages):
        if message.role not in ROLES:
            raise RequestError(
                f'messages[{number}] has the role "{message.role}", but a role is one of {", ".join(ROLES)}.'
            )
    last = messages[-1]
    if continue_final_message and last.role != "assistant":
        raise RequestError("continue_final_message is set, but the last message is not the assistant's.")
    if last.role == "assistant" and not continue_final_message:
        raise RequestError(
            "The last message is the assistant's: add one from the user, or set "
            "continue_final_message to have it continued."
        )
    if last.role == "user" and not last.content.strip():
        raise RequestError("The last message is empty: write what you want to ask.")


def _check_tools(tools: Sequence[Tool]) -> None:
    text = sum(len(tool.name) + len(tool.description) + len(tool.parameters) for tool in tools)
    at_most(MOST_TOOL_TEXT, text, "characters in the descriptions of tools")
    for tool in tools:
        if not tool.name:
            raise RequestError("A tool has no name.")
        if len(tool.parameters) > MOST_SCHEMA:
            raise RequestError(
                f'The parameters of the tool "{tool.name}" have {len(tool.parameters)} characters,'
                f" but may have {MOST_SCHEMA} at most."
            )
        is_object, nested = _object(tool.parameters or "{}")
        if not is_object:
            raise RequestError(f'The parameters of the tool "{tool.name}" are not a JSON schema object.')
        if nested:
            raise RequestError(
                f'The parameters of the tool "{tool.name}" are nested deeper than {MOST_NESTED} levels.'
            )


def _check_schema(schema: str) -> None:
    if len(schema) > MOST_SCHEMA:
        raise RequestError(
            f"The schema of response_format has {len(schema)} characters, but may have {MOST_SCHEMA} at most."
        )
    is_object, nested = _object(schema)
    if not is_object:
        raise RequestError("The schema of response_format is not a JSON schema object.")
    if nested:
        raise RequestError(f"The schema of response_format is nested deeper than {MOST_NESTED} levels.")


def _object(text: str) -> tuple[bool, bool]:
    """Whether `text` is a JSON object, and whether it is nested too deeply."""
    try:
        value = json.loads(text)
        return isinstance(value, dict), _nested(value)
    except ValueError:
        return False, False
    except RecursionError:
        return True, True


def _nested(value: object) -> bool:
    """Whether lists and objects stand in each other beyond MOST_NESTED levels."""
    level: list[Any] = [value]
    for _ in range(MOST_NESTED + 1):
        level = [item for item in level if isinstance(item, dict | list)]
        if not level:
            return False
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
    return True
