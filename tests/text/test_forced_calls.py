"""Answers that must be tool calls, drawn at random from everything the constraint allows."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace

import jsonschema
import numpy as np
import pytest
from kit_engine import Clock
from kit_text import DEEPSEEK, ModelOf
from llguidance import LLMatcher

from ktd.chat.tool_calls import Said, ToolCallParser
from ktd.errors import RequestError
from ktd.text import TextModel
from ktd.text.forced_calls import MOST_CALLS, calls_grammar
from ktd.text.grammar import Grammars, ReplyConstraint
from ktd.types import ChatRequest, Message, Tool, ToolCall

SCHEMAS = {
    "add": {"properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}}, "required": ["a"]},
    "say-it.1": {"type": "object", "properties": {"word": {"enum": ["ja", "nein"]}}, "required": ["word"]},
}
TOOLS = [
    Tool(name, "", json.dumps(schema | {"additionalProperties": False, "unheard of": 1}))
    for name, schema in SCHEMAS.items()
]
REQUEST = ChatRequest("r", [Message("user", "x")], tools=TOOLS, must_call=True)


def begin(text: TextModel, request: ChatRequest) -> ReplyConstraint:
    prompt = text.render(
        request.messages,
        thinking=request.thinking,
        continue_final_message=request.continue_final_message,
        tools=request.tools,
    )
    return text.constraint(request, prompt.ids, prompt.opens_thought)


def drawn(text: TextModel, constraint: ReplyConstraint, seed: int) -> str:
    shown, said, chance = text.detokenizer(), "", random.Random(seed)
    for _ in range(3000):
        logits = np.zeros(text.vocab_size, np.float32)
        constraint.mask(logits)
        number = chance.choice(np.flatnonzero(np.isfinite(logits)).tolist())
        constraint.accept(number)
        said += shown.push([number])
        if constraint.complete:
            return said
    pytest.fail(f"no end in sight: {said}")


def calls_of(said: str) -> list[ToolCall]:
    """What clients are told of `said`: calls, and no text beside them."""
    parser = ToolCallParser()
    events: Sequence[Said | ToolCall] = parser.push(said) + parser.flush()
    calls = [event for event in events if isinstance(event, ToolCall)]
    assert calls == list(events)
    for call in calls:
        jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
    return calls


@pytest.mark.parametrize("name", [*DEEPSEEK, "kimi-k2"])
def test_whatever_is_drawn_is_calls(model_of: ModelOf, name: str) -> None:
    text = model_of(name)
    request = replace(REQUEST, thinking=False if text.thinks else None)
    counts, names = set(), set()
    for seed in range(8):
        (call,) = calls_of(drawn(text, begin(text, replace(request, parallel_tool_calls=False)), seed))
        calls = calls_of(drawn(text, begin(text, request), seed))
        counts.add(len(calls))
        names |= {call.name, *(each.name for each in calls)}
    assert len(counts) > 1
    assert max(counts) <= MOST_CALLS
    assert names == set(SCHEMAS)


def test_the_thought_before_is_free(model_of: ModelOf) -> None:
    text = model_of("deepseek-r1")
    constraint = begin(text, replace(REQUEST, thinking=True))
    for number in [*text.encode("Hm. {"), text.vocabulary.structural["</think>"], *text.encode("\n")]:
        logits = np.zeros(text.vocab_size, np.float32)
        constraint.mask(logits)
        assert np.isfinite(logits[number])
        constraint.accept(number)
    assert calls_of(drawn(text, constraint, 1))


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (replace(REQUEST, tools=[Tool("a b", "", "{}")]), '"a b": give it a name'),
        (
            replace(REQUEST, tools=[Tool("f", "", '{"properties": {"a": {"type": "foo"}}}')]),
            'The schema of the tool "f" cannot be enforced: Invalid type: foo',
        ),
        (
            replace(
                REQUEST, messages=[*REQUEST.messages, Message("assistant", "So")], continue_final_message=True
            ),
            "cannot become a tool call",
        ),
    ],
)
def test_what_cannot_be_forced(model_of: ModelOf, request_: ChatRequest, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        begin(model_of("deepseek-v3-0324"), request_)


def test_a_model_without_tokens_for_calls() -> None:
    with pytest.raises(RequestError, match="has no tokens for tool calls"):
        calls_grammar({}, TOOLS, ["{}", "{}"], fenced=True, one=True)


@pytest.mark.parametrize(("seconds", "compiled"), [(3.0, 1), (1.5, 2)])
def test_tools_that_take_long_are_given_up(
    model_of: ModelOf, monkeypatch: pytest.MonkeyPatch, seconds: float, compiled: int
) -> None:
    """Whoever waits gives up in time, but others need the thread: those that took half of it one by one, the
    last one too, are not compiled together."""
    text, clock, compile_one, seen = model_of("deepseek-r1"), Clock(), Grammars._compiled, list[str]()

    def slow(grammars: Grammars, grammar: str, what: str) -> LLMatcher:
        seen.append(what)
        clock.advance(seconds)
        return compile_one(grammars, grammar, what)

    monkeypatch.setattr("ktd.text.grammar.monotonic", clock)
    monkeypatch.setattr(Grammars, "_compiled", slow)
    with pytest.raises(RequestError, match="The 2 tools take too long to compile"):
        begin(text, REQUEST)
    assert len(seen) == compiled
