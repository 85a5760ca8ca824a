"""The grammar of an answer that must be tool calls, in the format that the model knows."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from ktd.errors import RequestError
from ktd.text.tools import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEPARATOR
from ktd.types import Tool

# More in one answer are hardly meant: a model that is at a loss would go on to the end of its context.
MOST_CALLS = 16

_NAME, _ARGUMENTS, _NUMBER = object(), object(), object()
_Format = Sequence[object]
# Structural tokens stand by their texts. Kimi numbers the calls of a conversation.
_FENCED: _Format = (
    CALL_BEGIN, "function", SEPARATOR, _NAME, "\n```json\n", _ARGUMENTS, "\n```", CALL_END,
)  # fmt: skip
_BARE: _Format = (CALL_BEGIN, _NAME, SEPARATOR, _ARGUMENTS, CALL_END)
_KIMI: _Format = (
    "<|tool_call_begin|>", "functions.", _NAME, ":", _NUMBER, "<|tool_call_argument_begin|>", _ARGUMENTS,
    "<|tool_call_end|>",
)  # fmt: skip
_KIMI_BEGIN, _KIMI_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"


def arguments_schema(tool: Tool, options: Mapping[str, object]) -> str:
    """The schema of a call's arguments, an object, with llguidance's `options` in it."""
    return json.dumps(json.loads(tool.parameters or "{}") | {"type": "object", "x-guidance": options})


def calls_grammar(
    structural: Mapping[str, int], tools: Sequence[Tool], schemas: Sequence[str], *, fenced: bool, one: bool
) -> str:
    """llguidance's Lark grammar of an answer with calls of `tools`, of which `schemas` are the arguments'.

    `structural`: ids of the model's own tokens, by text. `fenced`: which of DeepSeek's two formats. `one`:
    exactly one call. Raises RequestError for a name that no format can hold, and for a model without tokens
    for calls.
    """
    begin, end, between, call = CALLS_BEGIN, CALLS_END, "", _BARE
    if _KIMI_BEGIN in structural:
        begin, end, call = _KIMI_BEGIN, _KIMI_END, _KIMI
    elif fenced:
        between, call = '"\\n" ', _FENCED
    if begin not in structural:
        raise RequestError("This model has no tokens for tool calls: it cannot be made to call one.")
    rules = []
    for number, (tool, schema) in enumerate(zip(tools, schemas, strict=True)):
        if not re.fullmatch(r"[\w.-]+", tool.name):
            raise RequestError(
                f'The model cannot be made to call the tool "{tool.name}": give it a name of letters, digits,'
                ' "_", "-" and "." only.'
            )
        items = [_item(item, structural, tool.name, f"arguments_{number}") for item in call]
        rules += [f"call_{number}: {' '.join(items)}", f"arguments_{number}: %json {schema}"]
    more = "" if one else f"({between}call){{0,{MOST_CALLS - 1}}} "
    calls = " | ".join(f"call_{number}" for number in range(len(tools)))
    start = f"start: <[{structural[begin]}]> call {more}<[{structural[end]}]>"
    return "\n".join([start, f"call: {calls}", *rules])


def _item(item: object, structural: Mapping[str, int], name: str, arguments: str) -> str:
    if item is _NAME:
        return json.dumps(name, ensure_ascii=False)
    if item is _ARGUMENTS:
        return arguments
    if item is _NUMBER:
        return "/[0-9]{1,3}/"
    text = str(item)
    return f"<[{structural[text]}]>" if text in structural else json.dumps(text)
