"""Checked messages as chat templates expect them: merged, thoughts set apart, users' text guarded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ktd.errors import RequestError
from ktd.text.guard import Guard
from ktd.types import Message, Tool, ToolCall

OPEN, CLOSE = "<think>", "</think>"
# Levels of lists and objects in JSON that is given to a template, which walks it by recursion.
MOST_NESTED = 64
_MERGED_ROLES = frozenset(("system", "user", "assistant"))


@dataclass(frozen=True)
class Turn:
    """A message after merging. All text is guarded: what is structural in `content`, ktd put there."""

    role: str
    content: str
    reasoning: str = ""
    calls: Sequence[ToolCall] = ()
    call_id: str = ""


def turns(messages: Sequence[Message], guard: Guard, *, split_thoughts: bool) -> list[Turn]:
    """One turn per message, neighbours of the same role joined by a blank line.

    `split_thoughts`: the model's template knows `</think>`, so a thought that a client left in an assistant's
    content is set apart; everything up to the last `</think>` counts as thought, as in DeepSeek's templates.
    """
    groups: list[list[Turn]] = []
    for message in messages:
        turn = _turn(message, guard, split_thoughts)
        last = groups[-1][-1] if groups else None
        if last and last.role == turn.role and turn.role in _MERGED_ROLES and not last.calls:
            groups[-1].append(turn)
        else:
            groups.append([turn])
    return [_merged(group) for group in groups]


def _merged(group: Sequence[Turn]) -> Turn:
    contents = "\n\n".join(turn.content for turn in group if turn.content)
    thoughts = "\n\n".join(turn.reasoning for turn in group if turn.reasoning)
    return replace(group[-1], content=contents, reasoning=thoughts)


def _turn(message: Message, guard: Guard, split_thoughts: bool) -> Turn:
    content, reasoning = message.content, message.reasoning_content
    if split_thoughts and message.role == "assistant" and not reasoning and CLOSE in content:
        thought, _, content = content.rpartition(CLOSE)
        reasoning = thought.strip().removeprefix(OPEN).strip()
    return Turn(
        message.role,
        guard.mark(content),
        guard.mark(reasoning),
        [replace(call, name=guard.mark(call.name)) for call in message.tool_calls],
        guard.mark(message.tool_call_id),
    )


def opened_turn(message: Message, guard: Guard, *, thinks: bool) -> tuple[str, bool]:
    """The text of an assistant message that is to be continued, and whether it ends inside its thought.

    Unlike an old turn it keeps its thought: the tags around it are structural, everything else is guarded.
    """
    if not thinks:
        return guard.mark(message.content), False
    if message.reasoning_content:
        thought, content = message.reasoning_content, message.content
        if not content:
            return f"{OPEN}\n{guard.mark(thought)}", True
        return f"{OPEN}\n{guard.mark(thought)}\n{CLOSE}\n\n{guard.mark(content)}", False
    content = message.content.lstrip()
    opened = content.startswith(OPEN)
    thought, closed, content = content.removeprefix(OPEN).lstrip("\n").partition(CLOSE)
    if closed:
        return f"{OPEN}\n{guard.mark(thought)}{CLOSE}{guard.mark(content)}", False
    return (f"{OPEN}\n{guard.mark(thought)}", True) if opened else (guard.mark(message.content), False)


def begun_answer(message: Message, *, thinks: bool) -> str:
    """What an assistant message that is to be continued holds of its answer, after any thought."""
    if message.reasoning_content or not thinks or CLOSE not in message.content:
        return message.content
    return message.content.partition(CLOSE)[2]


def template_message(turn: Turn, guard: Guard, *, parsed_arguments: bool) -> dict[str, object]:
    """The message as a template reads it; keys without a value are left out."""
    message: dict[str, object] = {"role": turn.role, "content": turn.content}
    if turn.reasoning:
        message["reasoning_content"] = turn.reasoning
    if turn.call_id:
        message["tool_call_id"] = turn.call_id
    if turn.calls:
        # DeepSeek's first templates look for calls only where there is no content at all.
        message["content"] = turn.content or None
        message["tool_calls"] = [
            {
                "id": guard.mark(call.id),
                "type": "function",
                "function": {
                    "name": call.name,
                    "arguments": _mark_json(_parsed(call.arguments, f"call of {call.name}"), guard)
                    if parsed_arguments
                    else guard.mark(call.arguments),
                },
            }
            for call in turn.calls
        ]
    return message


def template_tool(tool: Tool, guard: Guard) -> dict[str, Any]:
    """The tool as a template reads it (OpenAI's form)."""
    return {
        "type": "function",
        "function": {
            "name": guard.mark(tool.name),
            "description": guard.mark(tool.description),
            "parameters": _mark_json(_parsed(tool.parameters or "{}", f"schema of tool {tool.name}"), guard),
        },
    }


def _parsed(text: str, what: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise RequestError(f"the {what} is not JSON: send a JSON object") from None


def _mark_json(value: object, guard: Guard, levels: int = MOST_NESTED) -> object:
    if isinstance(value, str):
        return guard.mark(value)
    if isinstance(value, list | dict) and not levels:
        raise RequestError(
            f"a tool call or schema is nested deeper than {MOST_NESTED} levels: make it flatter"
        )
    if isinstance(value, list):
        return [_mark_json(item, guard, levels - 1) for item in value]
    if isinstance(value, dict):
        return {guard.mark(key): _mark_json(item, guard, levels - 1) for key, item in value.items()}
    return value
