"""What a request may hold: it is read in the event loop, so a huge one would stop everybody's answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from kit_text import BARE, bot, maker, user

from ktd.chat.fields import MOST_BRACKETS
from ktd.chat.ollama_request import from_chat
from ktd.chat.openai_request import from_openai
from ktd.chat.request import (
    LONGEST_STOP,
    MOST_BIASES,
    MOST_MESSAGES,
    MOST_TOOL_TEXT,
    MOST_TOOLS,
    RequestDefaults,
    from_proto,
)
from ktd.errors import ContextExceeded, RequestError
from ktd_proto.v1 import engine_pb2 as pb

DEFAULTS = RequestDefaults()
HI = {"role": "user", "content": "hi"}
CALL = {"function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f", "description": "d" * (MOST_TOOL_TEXT // 2)}}


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (pb.ChatRequest(messages=[pb.Message()] * (MOST_MESSAGES + 1)), "There are 8193 messages, but at"),
        (
            pb.ChatRequest(messages=[pb.Message(tool_calls=[pb.ToolCall()] * (MOST_MESSAGES + 1))]),
            "There are 8193 tool calls",
        ),
        (pb.ChatRequest(tools=[pb.Tool()] * (MOST_TOOLS + 1)), "There are 1025 tools"),
        (pb.ChatRequest(sampling=pb.Sampling(stop=["s"] * 17)), "There are 17 stop strings"),
        (
            pb.ChatRequest(sampling=pb.Sampling(logit_bias=dict.fromkeys(range(MOST_BIASES + 1), 1.0))),
            "There are 262145 tokens in logit_bias",
        ),
        (
            pb.ChatRequest(
                messages=[pb.Message(role="user", content="hi")],
                sampling=pb.Sampling(stop=["s" * (LONGEST_STOP + 1)]),
            ),
            "A stop string has 257 characters",
        ),
    ],
)
def test_a_message_that_holds_too_much(request_: pb.ChatRequest, sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        from_proto(request_, DEFAULTS)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"messages": [{}] * (MOST_MESSAGES + 1)}, "There are 8193 messages"),
        ({"messages": [{**HI, "tool_calls": [CALL] * (MOST_MESSAGES + 1)}]}, "There are 8193 .*calls"),
        ({"messages": [HI], "tools": [{}] * (MOST_TOOLS + 1)}, "There are 1025 tools"),
        ({"messages": [HI], "tools": [TOOL] * 2}, "characters in the descriptions of tools"),
    ],
)
@pytest.mark.parametrize("read", [from_openai, from_chat])
def test_a_body_that_holds_too_much(
    read: Callable[[bytes, RequestDefaults], object], fields: dict[str, object], sentence: str
) -> None:
    with pytest.raises(RequestError, match=sentence):
        read(json.dumps(fields).encode(), DEFAULTS)


@pytest.mark.parametrize("read", [from_openai, from_chat])
def test_a_body_of_many_small_values(read: Callable[[bytes, RequestDefaults], object]) -> None:
    body = b'{"messages": [{"role": "user", "content": "hi"}], "x": [' + b"[]," * MOST_BRACKETS + b"[]]}"
    with pytest.raises(RequestError, match="brackets in the body, but at most 262144 are allowed"):
        read(body, DEFAULTS)


def test_calls_count_as_messages() -> None:
    calls = {"role": "assistant", "tool_calls": [CALL] * (MOST_MESSAGES // 2)}
    with pytest.raises(RequestError, match="There are 8195 messages and tool calls"):
        from_openai(json.dumps({"messages": [HI, calls, calls]}).encode(), DEFAULTS)


def test_a_prompt_far_beyond_the_context_is_not_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = maker(tmp_path)(BARE)
    conversation = [user("1"), bot("word " * 10_000), user("2")]
    assert len(model.render(conversation, most_tokens=100_000).ids) > 10_000
    encoded: list[str] = []
    monkeypatch.setattr(model._tokenizer, "encode", lambda text: encoded.append(text) or [])
    with pytest.raises(ContextExceeded, match="more tokens than the 100 that the context holds"):
        model.render(conversation, most_tokens=100)
    assert sum(map(len, encoded)) < 100
