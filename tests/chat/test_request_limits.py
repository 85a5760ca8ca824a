"""What a request may hold: others wait while a huge one is read."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from kit_text import BARE, bot, maker, user

from ktd.chat.fields import MOST_BACKSLASHES, MOST_BRACKETS, MOST_COMMAS
from ktd.chat.ollama_request import from_chat
from ktd.chat.openai_request import from_openai
from ktd.chat.request import (
    LONGEST_STOP,
    MOST_BIASES,
    MOST_MESSAGES,
    MOST_SCHEMA,
    MOST_TOOL_TEXT,
    MOST_TOOLS,
    RequestDefaults,
    from_proto,
)
from ktd.errors import ContextExceeded, RequestError
from ktd.server.reading import SMALL, chat_request, read
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
        (
            pb.ChatRequest(
                messages=[pb.Message(role="user", content="hi")],
                tools=[pb.Tool(name="f", parameters_json=" " * MOST_SCHEMA + "{}")],
            ),
            'parameters of the tool "f" have 65538 characters',
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


@pytest.mark.parametrize(("character", "most"), [(",", MOST_COMMAS), ("\\", MOST_BACKSLASHES)])
def test_a_body_that_takes_long_to_parse_is_not_parsed(character: str, most: int) -> None:
    with pytest.raises(RequestError, match=f"There are {most + 1} .* in the body"):
        from_openai(b"{" + character.encode() * (most + 1), DEFAULTS)


def in_wire(number: int, *within: bytes) -> bytes:
    """A field that holds bytes, as protobuf writes it."""
    data = b"".join(within)
    size, sizes = len(data), b""
    while size > 127:
        sizes, size = sizes + bytes([size & 127 | 128]), size >> 7
    return bytes([number << 3 | 2]) + sizes + bytes([size]) + data


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (in_wire(2) * 300_000, "There are 8193 messages"),
        (in_wire(8) * 300_000, "There are 1025 tools"),
        (in_wire(2, in_wire(5) * 300_000), "There are 8193 tool calls"),
        (in_wire(2, in_wire(5) * 5_000) + in_wire(2, in_wire(5) * 20_000), "There are 8193 tool calls"),
        (in_wire(3, in_wire(10) * 300_000), "There are 17 stop strings"),
        (in_wire(3, in_wire(11) * 300_000), "There are 262145 tokens in logit_bias"),
        (in_wire(3) * 100_000, "There are 65537 fields of one kind"),
        (in_wire(15) * 100_000, "There are 65537 fields of one kind"),
        (bytes([15 << 3]) + b"\0" * 100_000, "is not a ktd.v1.ChatRequest"),
        (bytes([15 << 3 | 3, 15 << 3 | 4]) * 100_000, "is not a ktd.v1.ChatRequest"),
        (b"\xff" * 100_000, "is not a ktd.v1.ChatRequest"),
    ],
)
def test_what_makes_millions_of_objects_is_refused_before(
    monkeypatch: pytest.MonkeyPatch, data: bytes, sentence: str
) -> None:
    monkeypatch.setattr(pb.ChatRequest, "FromString", lambda data: pytest.fail("it was parsed"))
    with pytest.raises(RequestError, match=sentence):
        chat_request(data)


def test_a_large_request_is_read() -> None:
    messages = [pb.Message(role="user", content="x" * 50, tool_calls=[pb.ToolCall(id="1")])] * 1000
    sampling = pb.Sampling(temperature=0.5, seed=2**64 - 1, stop=["s"], logit_bias={1: 0.5, 2**32 - 1: -1})
    request = pb.ChatRequest(model="m", messages=messages, sampling=sampling, priority=pb.PRIORITY_LOW)
    data = request.SerializeToString()
    assert len(data) > SMALL
    assert chat_request(data) == request
    with pytest.raises(RequestError, match="not UTF-8"):
        chat_request(data.replace(b"xx", b"\xff\xff"))


async def test_only_small_requests_are_read_in_the_loop() -> None:
    own = threading.get_ident()
    assert await read(bytes(SMALL), lambda data: threading.get_ident()) == own
    assert await read(bytes(SMALL + 1), lambda data: threading.get_ident()) != own


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
