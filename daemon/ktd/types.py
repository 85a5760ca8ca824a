"""Values that travel between the layers. Imports nothing of ktd."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import numpy as np
import numpy.typing as npt


class Priority(Enum):
    """LOW requests (titles and other background work) are admitted only when no NORMAL one waits."""

    NORMAL = 0
    LOW = 1


class FinishReason(Enum):
    """Why an answer ended."""

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn. Ranges are checked where requests enter (`ktd.chat.request`).

    Defaults are DeepSeek's recommendation for R1. temperature 0 is greedy. top_k 0, min_p 0 and
    repetition_penalty 1 switch the rule off. top_logprobs: every token comes with its log probability and
    with those of so many of the likeliest at its place; None: with none.
    """

    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One call of a tool that the model asked for; `arguments` is a JSON object as text."""

    id: str
    name: str
    arguments: str
    index: int = 0


@dataclass(frozen=True, slots=True)
class Tool:
    """A tool the client offers; `parameters` is a JSON schema as text."""

    name: str
    description: str
    parameters: str


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation. `role` is system, user, assistant or tool."""

    role: str
    content: str
    reasoning_content: str = ""
    tool_calls: Sequence[ToolCall] = ()
    tool_call_id: str = ""


@dataclass(frozen=True, slots=True)
class AnswerSchema:
    """The answer, not the thought before it, must be JSON that `schema` allows, a JSON schema as text.

    `lenient`: what of the schema cannot be enforced is ignored instead of refused.
    """

    schema: str
    lenient: bool = False


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A checked chat request. `max_tokens` counts thought and answer; None means what the context leaves.

    Without `parallel_tool_calls` the answer ends with its first call. With `must_call` the answer is calls of
    the tools and nothing else. `client`: who asks; clients take turns.
    """

    request_id: str
    messages: Sequence[Message]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    stop: Sequence[str] = ()
    thinking: bool | None = None
    continue_final_message: bool = False
    priority: Priority = Priority.NORMAL
    tools: Sequence[Tool] = ()
    schema: AnswerSchema | None = None
    parallel_tool_calls: bool = True
    must_call: bool = False
    client: str = ""


class Constraint(Protocol):
    """Which tokens one request may draw next. Used by the engine thread alone; raises EngineFailure."""

    def mask(self, logits: npt.NDArray[np.float32]) -> None:
        """Sets `logits` [vocab] of the tokens that may not come next to -inf."""

    def accept(self, token: int) -> None:
        """`token` was drawn."""

    @property
    def complete(self) -> bool:
        """Whether only the end may follow."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What the engine is asked for: token ids in, token ids out.

    `max_tokens` is at least 1 and prompt + max_tokens fits in the context. Drawing one of `stop_ids`, or what
    makes the `constraint` complete, ends the request with FinishReason.STOP; a stop token is not published.
    Clients take turns: "" is one like any other.
    """

    request_id: str
    prompt: Sequence[int]
    max_tokens: int
    sampling: SamplingParams
    stop_ids: frozenset[int]
    priority: Priority = Priority.NORMAL
    constraint: Constraint | None = None
    client: str = ""


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """A snapshot of the step loop. Counters run from the start of the daemon."""

    running: int
    waiting: int
    pages_total: int
    pages_free: int
    prompt_tokens_total: int
    completion_tokens_total: int
    steps_total: int


# What the engine tells about one request, in this order: Queued*, Prefilled*, Tokens*, then exactly one of
# Ended and Failed. Sent from the engine thread.


@dataclass(frozen=True, slots=True)
class Queued:
    """`position` requests are in front; 0 = next. Others may yet come in front."""

    position: int


@dataclass(frozen=True, slots=True)
class Prefilled:
    """`done` of `total` prompt tokens are in the cache, `cached` of them found there."""

    done: int
    total: int
    cached: int
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a drawn token was, and the likeliest at its place: (id, log probability), likeliest first.

    Natural logarithms of the model's own probabilities: at temperature 1, before biases, penalties, filters
    and constraints. Float32 values, none below -9999.
    """

    logprob: float
    top: Sequence[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class Tokens:
    """Token ids drawn in one step, the end-of-turn token not among them.

    `scores` has one for each id where SamplingParams.top_logprobs asks for them, and is empty otherwise.
    """

    ids: Sequence[int]
    scores: Sequence[Score] = ()


@dataclass(frozen=True, slots=True)
class Timings:
    """Wall-clock seconds a request spent waiting, reading its prompt, and writing."""

    queue_seconds: float
    prefill_seconds: float
    decode_seconds: float


@dataclass(frozen=True, slots=True)
class Ended:
    """The last word of a request that went well."""

    reason: FinishReason
    timings: Timings


@dataclass(frozen=True, slots=True)
class Failed:
    """The last word of a request that did not: `error` is a ktd.errors.KtdError."""

    error: Exception


EngineEvent = Queued | Prefilled | Tokens | Ended | Failed


# What a client is told about one chat (the daemon's side of ktd.v1.ChatEvent). Queued is the engine's.


@dataclass(frozen=True, slots=True)
class Prefill:
    """Prompt progress; the last one precedes the first text with done == total."""

    done: int
    total: int
    tokens_per_second: float


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token of a text, or (with an empty `top`) one that might have stood there; `logprob` as in Score.

    `data` are its UTF-8 bytes, at times a part of a character. Of a token that a tag or a stop string cuts
    it is what the text holds of it.
    """

    id: int
    data: bytes
    logprob: float
    top: Sequence[TokenLogprob] = ()


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of the thought, without tags. The `tokens`, if they are asked for, make up the text."""

    text: str
    tokens: Sequence[TokenLogprob] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """A piece of the answer. The `tokens`, if they are asked for, make up the text."""

    text: str
    tokens: Sequence[TokenLogprob] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Counts in tokens; comes once, before Finished."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    timings: Timings


@dataclass(frozen=True, slots=True)
class Finished:
    """The terminal event of a chat that went well."""

    reason: FinishReason


ChatEvent = Queued | Prefill | Reasoning | Answer | ToolCall | Usage | Finished
