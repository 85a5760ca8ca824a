"""The tokens of an event make up its text, whatever is cut out of a reply and wherever its tokens end."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import cast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ktd.chat.interfaces import Text
from ktd.chat.teller import Teller, TokenTeller
from ktd.chat.turn import Turn
from ktd.types import Answer, ChatEvent, Prefill, Reasoning, Score, TokenLogprob, ToolCall

R1_CALL = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
    "<｜tool▁calls▁end｜>"
)
PIECES = st.sampled_from([
    "<think>", "</think>", "<thi", "nk>", " ", "\n", "\n\n", "Hm.", "a", "é", "你好", "😀", "`", "```\n",
    "\ufffd", "STOP", "ST", "end", "<｜tool", R1_CALL.format("f", "{}"), R1_CALL.format("g", "{"),
    b"\xff", b"\xe4", b"\xe4\xbd", b"\xf0\x9f\x98", b"\x80", b"",
])  # fmt: skip


class Pieces:
    """Tokens are places in a list of bytes; a text is what they make up."""

    def __init__(self, tokens: Sequence[bytes]) -> None:
        self.tokens = tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        return self._decoder.decode(b"".join(self.tokens[number] for number in ids))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)

    def token_bytes(self, token: int) -> bytes:
        return self.tokens[token]

    def token_name(self, token: int) -> bytes:
        return self.tokens[token] or b"<hidden>"


def told(
    tokens: Sequence[bytes], opened: bool, stop: Sequence[str], tools: bool, *, scored: bool
) -> list[ChatEvent]:
    text = Pieces(tokens)
    teller = TokenTeller(cast(Text, text)) if scored else Teller()
    turn = Turn(
        text, teller, prompt_tokens=1, opens_thought=opened, stop=stop, parse_tools=tools, constrained=False
    )
    events: list[ChatEvent] = []
    for number in range(len(tokens)):
        scores = [Score(-number, [(number, -number), (0, -100.0)])] if scored else []
        events += turn.write([number], scores)
        if turn.stopped:
            return events
    return events + list(turn.end())


def joined(events: Sequence[ChatEvent]) -> list[tuple[object, ...]]:
    """Text by kind, in order, pieces joined; calls by what they call."""
    runs: list[tuple[object, ...]] = []
    for event in events:
        if isinstance(event, ToolCall):
            runs.append((ToolCall, event.name, event.index))
        elif isinstance(event, Reasoning | Answer):
            same = bool(runs) and runs[-1][0] is type(event)
            before = str(runs.pop()[1]) if same else ""
            runs.append((type(event), before + event.text))
    return runs


@settings(max_examples=300, deadline=None)
@given(
    pieces=st.lists(PIECES, max_size=14),
    cuts=st.lists(st.integers(1, 9), max_size=40),
    opened=st.booleans(),
    stop=st.sampled_from([[], ["STOP"], ["STOP", "好"]]),
    tools=st.booleans(),
)
@example(["<think>", "Hm.", "\n\n", "</think>", "\n", "hm"], [2] * 40, False, [], False)
@example(["你好", b"\xe4"], [4], False, [], False)
@example([b"\xe4", "a", b"\xf0\x9f\x98"], [], False, [], False)
@example(
    ["a", R1_CALL.format("g", "{"), "ST", R1_CALL.format("f", "{}"), "OP"], [4] * 99, False, ["STOP"], True
)
def test_the_tokens_are_the_text(
    pieces: list[str | bytes], cuts: list[int], opened: bool, stop: list[str], tools: bool
) -> None:
    data = b"".join(piece.encode() if isinstance(piece, str) else piece for piece in pieces)
    tokens, at = [], 0
    for length in (*cuts, 1000):
        tokens.append(data[at : at + length])
        at += length
    events = told(tokens, opened, stop, tools, scored=True)
    assert joined(events) == joined(told(tokens, opened, stop, tools, scored=False))
    for kind in (Reasoning, Answer):
        seen: list[TokenLogprob] = []
        for event in events:
            if isinstance(event, kind):
                assert event.text
                assert b"".join(token.data for token in event.tokens) == event.text.encode()
                seen += event.tokens
        numbers = [token.id for token in seen]
        calls = any(isinstance(event, ToolCall) for event in events)
        assert numbers == sorted(numbers if calls else set(numbers)), "each once, in order"
        for token in seen:
            assert token.logprob == -token.id
            left = iter(tokens[token.id])
            assert all(byte in left for byte in token.data) or b"\xef\xbf\xbd" in token.data
            assert (token.top[0].id, token.top[0].data) == (token.id, tokens[token.id])


@pytest.mark.parametrize(
    ("tokens", "stop", "expected"),
    [
        (["<think>", "Hi", ".\n\n", "</think>", "\n\n", "hi"], [], ["Hi 1:Hi", ". 2:.", "hi 5:hi"]),
        (["<think>h</", "think>hi"], [], ["h 0:h", "hi 1:hi"]),
        (["\n", "<think>", "\n", "\n", "a", "\n", "b"], [], ["a 4:a", "\nb 5:\n 6:b"]),
        (["one", " STO", "P two"], ["STOP"], ["one 0:one", "  1: "]),
        (["one", " STO", "ne"], ["STOP"], ["one 0:one", " STOne 1: STO 2:ne"]),
        (["a", "ST", "STOP"], ["STOP"], ["a 0:a", "ST 1:ST"]),
    ],
)
def test_what_is_told_when(tokens: list[str], stop: list[str], expected: list[str]) -> None:
    events = told([token.encode() for token in tokens], False, stop, False, scored=True)
    texts = [
        " ".join([event.text, *(f"{token.id}:{token.data.decode()}" for token in event.tokens)])
        for event in events
        if isinstance(event, Reasoning | Answer)
    ]
    assert texts == expected


def test_a_character_of_several_tokens_is_told_with_all_of_them() -> None:
    events = told([b"a", b"\xe4", b"\xbd\xa0", b"b"], False, [], False, scored=True)
    answers = [event for event in events if isinstance(event, Answer)]
    assert [(e.text, [t.data for t in e.tokens]) for e in answers] == [
        ("a", [b"a"]),
        ("你", [b"\xe4", b"\xbd\xa0"]),
        ("b", [b"b"]),
    ]


def test_a_token_that_no_text_shows_is_named_among_the_likeliest() -> None:
    events = [
        event for event in told([b"", b"x"], False, [], False, scored=True) if not isinstance(event, Prefill)
    ]
    (answer,) = events
    assert isinstance(answer, Answer)
    (token,) = answer.tokens
    assert [other.data for other in token.top] == [b"x", b"<hidden>"]
