"""Replies under a schema, drawn at random from everything the constraint allows."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ktd.errors import EngineFailure, RequestError
from ktd.gguf import GgufFile
from ktd.launch import embedded_model
from ktd.text import TextModel
from ktd.text.grammar import ReplyConstraint
from ktd.types import AnswerSchema, ChatRequest, Message, Tool

Json = dict[str, Any]
PERSON: Json = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["home", "work", None]},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,5}$"}, "maxItems": 3},
        "born": {"type": "string", "format": "date"},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
POINT: Json = {
    "type": "object",
    "properties": {"x": {"type": "integer"}},
    "required": ["x"],
    "additionalProperties": False,
}
MOST = 400


@pytest.fixture(scope="module")
def text() -> TextModel:
    with GgufFile.open(embedded_model()) as gguf:
        return TextModel.from_gguf(gguf)


def begin(text: TextModel, schema: Json, lenient: bool = False, **fields: Any) -> ReplyConstraint:
    """The constraint of a reply to "x"."""
    fields.setdefault("messages", [Message("user", "x")])
    request = ChatRequest("r", schema=AnswerSchema(json.dumps(schema), lenient), **fields)
    prompt = text.render(
        request.messages,
        thinking=request.thinking,
        continue_final_message=request.continue_final_message,
        tools=request.tools,
    )
    return text.constraint(request, prompt.ids, prompt.opens_thought)


def allowed(text: TextModel, constraint: ReplyConstraint) -> set[int]:
    logits = np.zeros(text.vocab_size, np.float32)
    constraint.mask(logits)
    return set(np.flatnonzero(np.isfinite(logits)).tolist())


def token(text: TextModel, name: str) -> int:
    return text.vocabulary.structural[name]


def drawn(text: TextModel, constraint: ReplyConstraint, choose: Callable[[Sequence[int]], int]) -> str:
    """What comes out when `choose` picks of the allowed tokens until the end."""
    shown = text.detokenizer()
    said = ""
    for _ in range(MOST):
        number = choose(sorted(allowed(text, constraint)))
        constraint.accept(number)
        if number in text.stop_ids:
            break
        said += shown.push([number])
        if constraint.complete:
            break
    else:
        pytest.fail(f"no end in sight: {said}")
    return said + shown.flush()


def write(text: TextModel, constraint: ReplyConstraint, answer: str) -> None:
    """Draws the tokens of `answer`, which must all be allowed."""
    for number in text.encode(answer):
        assert number in allowed(text, constraint), (answer, text.vocabulary.tokens[number])
        constraint.accept(number)


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_drawn_validates(text: TextModel, seed: int) -> None:
    answer = drawn(text, begin(text, PERSON, thinking=False), random.Random(seed).choice)
    jsonschema.validate(json.loads(answer), PERSON, format_checker=jsonschema.FormatChecker())


def integers(low: int, more: int) -> Json:
    return {"type": "integer", "minimum": low, "maximum": low + more}


def strings(least: int, more: int) -> Json:
    return {"type": "string", "minLength": least, "maxLength": least + more}


VALUES = st.one_of(st.none(), st.booleans(), st.text(max_size=3))
LEAVES = st.one_of(
    st.builds(integers, st.integers(-50, 50), st.integers(0, 99)),
    st.builds(strings, st.integers(0, 3), st.integers(0, 5)),
    st.builds(lambda values: {"enum": values}, st.lists(VALUES, min_size=1, max_size=3)),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {"const": {"a": [1, "é\n"]}}]),
)


def objects(inner: st.SearchStrategy[Json]) -> st.SearchStrategy[Json]:
    names = st.lists(st.text('ab"\\é中\n', min_size=1, max_size=3), unique=True, max_size=3)
    return st.builds(
        lambda names, schemas, needed: {
            "type": "object",
            "properties": dict(zip(names, schemas, strict=False)),
            "required": names[:needed],
            "additionalProperties": False,
        },
        names,
        st.lists(inner, min_size=3, max_size=3),
        st.integers(0, 3),
    )


SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        objects(inner),
        st.builds(lambda item, n: {"type": "array", "items": item, "maxItems": n}, inner, st.integers(0, 2)),
        st.builds(lambda branches: {"anyOf": branches}, st.lists(inner, min_size=1, max_size=2)),
    ),
    max_leaves=4,
)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(SCHEMAS, st.integers(0, 99))
def test_answers_to_any_schema_validate(text: TextModel, schema: Json, seed: int) -> None:
    answer = drawn(text, begin(text, schema, thinking=False), random.Random(seed).choice)
    jsonschema.validate(json.loads(answer), schema)


@pytest.mark.parametrize("indent", [None, 1, 4, "\t"])
def test_json_may_be_indented(text: TextModel, indent: int | str | None) -> None:
    value = {"name": "Zoë 中", "age": 7, "kind": None, "tags": ["a", "bc"]}
    constraint = begin(text, PERSON, thinking=False)
    write(text, constraint, json.dumps(value, indent=indent, ensure_ascii=False))
    assert constraint.complete


def test_a_number_alone_ends_by_a_stop_token(text: TextModel) -> None:
    constraint = begin(text, {"type": "integer", "maximum": 9999}, thinking=False)
    assert not text.stop_ids & allowed(text, constraint)
    write(text, constraint, "12")
    assert not constraint.complete
    assert text.stop_ids <= allowed(text, constraint)


@pytest.mark.parametrize("thinking", [True, None])
def test_the_thought_is_free_and_cannot_end_the_reply(text: TextModel, thinking: bool | None) -> None:
    constraint = begin(text, POINT, thinking=thinking)
    if thinking is None:
        assert allowed(text, constraint) >= {token(text, "<think>")}
        constraint.accept(token(text, "<think>"))
    assert allowed(text, constraint) == set(range(text.vocab_size)) - text.stop_ids
    for number in text.encode('\nI think "{" and so on.\n'):
        constraint.accept(number)
    assert not constraint.complete
    constraint.accept(token(text, "</think>"))
    write(text, constraint, '\n\n{"x":5}')
    assert constraint.complete


def test_a_thought_is_not_offered_where_none_is_wanted_or_it_is_over(text: TextModel) -> None:
    assert token(text, "<think>") not in allowed(text, begin(text, POINT, thinking=False))
    over = [Message("user", "x"), Message("assistant", "<think>\nhm\n</think>\n\n")]
    constraint = begin(text, POINT, messages=over, continue_final_message=True)
    assert token(text, "<think>") not in allowed(text, constraint)
    write(text, constraint, '{"x":5}')


def test_a_tag_in_code_or_spelt_out_ends_the_thought_too(text: TextModel) -> None:
    for tag in ([token(text, "</think>")], [*text.encode("</thi"), *text.encode("nk>")]):
        constraint = begin(text, POINT, thinking=True)
        for number in [*text.encode("`code "), *tag]:
            constraint.accept(number)
        write(text, constraint, '{"x":5}')
        assert constraint.complete


def test_tools_may_be_called_instead(text: TextModel) -> None:
    calls = token(text, "<｜tool▁calls▁begin｜>")
    assert calls not in allowed(text, begin(text, POINT, thinking=False))
    tool = Tool("look", "", "{}")
    constraint = begin(text, POINT, thinking=True, tools=[tool])
    constraint.accept(token(text, "</think>"))
    answering, calling = constraint, begin(text, POINT, thinking=False, tools=[tool])
    for each in (answering, calling):
        assert calls in allowed(text, each)
    write(text, answering, '{"x":')
    assert calls not in allowed(text, answering)
    calling.accept(calls)
    assert len(allowed(text, calling)) == text.vocab_size
    assert not calling.complete


def test_a_model_whose_calls_have_no_token_takes_one_of_the_two(
    text: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text._grammars, "calls", frozenset())
    with pytest.raises(RequestError, match="no tools beside a response_format"):
        begin(text, POINT, tools=[Tool("look", "", "{}")])


def test_an_answer_can_be_continued(text: TextModel) -> None:
    def go_on(content: str, thought: str = "") -> ReplyConstraint:
        messages = [Message("user", "x"), Message("assistant", content, thought)]
        return begin(text, POINT, messages=messages, continue_final_message=True)

    for constraint in (go_on('{"x": 1'), go_on('<think>\nhm\n</think>\n\n{"x": 1'), go_on('{"x": 1', "hm")):
        write(text, constraint, "2}")
        assert constraint.complete
    opened = go_on("", "hm")
    opened.accept(token(text, "</think>"))
    write(text, opened, '{"x":1}')
    with pytest.raises(RequestError, match="does not fit the response_format"):
        go_on('{"y"')
    with pytest.raises(RequestError, match="is complete by the response_format"):
        go_on('{"x": 1}')


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "foo"}, "Invalid type: foo."),
        ({"enum": []}, "Unsatisfiable schema: anyOf is empty."),
        ({"type": "integer", "minimum": 5, "maximum": 2}, "minimum (5) is greater than maximum (2)."),
        ({"properties": 5}, "properties must be an object."),
        ({"$ref": "http://other/place"}, "'http://other/place' is not present"),
        ({"type": "string", "pattern": "(?=a)b"}, "regex parse error: look-around, including"),
        ({"type": "array", "uniqueItems": True}, '["uniqueItems"]; with strict set to false it is ignored.'),
        ({"type": "string", "format": "colour"}, "Unknown format: colour; with strict set to false"),
        ({"oneOf": [{"type": "string"}, {"type": "string", "minLength": 2}]}, "oneOf is supported only"),
        ({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "no JSON fits it."),
        ({"type": "object", "properties": {f"p{n}": {} for n in range(600)}}, "too many choices open"),
        ({"const": "\ud800"}, "unexpected end of hex escape"),
        ({"type": "number", "minimum": float("nan")}, ""),
    ],
)
def test_what_is_wrong_with_a_schema_is_told(text: TextModel, schema: Json, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        begin(text, schema)
    sentence = str(caught.value)
    assert sentence.startswith("The schema of response_format cannot be enforced: ")
    assert said in sentence
    assert sentence.endswith(".")
    assert "\n" not in sentence


def test_what_cannot_be_enforced_is_ignored_where_that_is_wanted(text: TextModel) -> None:
    schema = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True, "not": {"const": [3]}}
    constraint = begin(text, schema, lenient=True, thinking=False)
    write(text, constraint, "[3,3]")
    assert constraint.complete


def test_a_schema_cannot_change_how_it_is_compiled(text: TextModel) -> None:
    with pytest.raises(RequestError, match="uniqueItems"):
        begin(text, {"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}})


def test_blanks_come_to_an_end(text: TextModel) -> None:
    blanks = {n for n in range(text.vocab_size) if not text.detokenizer().push([n]).strip()} - text.stop_ids
    constraint = begin(text, POINT, thinking=False)
    write(text, constraint, "{")
    for _ in range(60):
        if not (left := blanks & allowed(text, constraint)):
            return
        constraint.accept(min(left))
    pytest.fail("a model at a loss may write blanks for ever")


def test_a_token_that_was_not_allowed_ends_in_one_sentence(text: TextModel) -> None:
    constraint = begin(text, POINT, thinking=False)
    with pytest.raises(
        EngineFailure, match=r"cannot go on as its response_format or tool_choice wants it: .*\.$"
    ) as caught:
        constraint.accept(text.encode("no")[0])
    assert "\n" not in str(caught.value)
    with pytest.raises(EngineFailure, match="cannot go on"):
        allowed(text, constraint)
