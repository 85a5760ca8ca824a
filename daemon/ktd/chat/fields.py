"""Reads the fields of JSON bodies, whatever API they belong to: a wrong one is told by its name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ktd.chat.request import MOST_STOPS, MOST_TOOLS, at_most
from ktd.errors import RequestError
from ktd.types import Tool

# Parsing millions of values takes seconds in one call. What is within texts counts too: so many fit into no
# context.
MOST_BRACKETS = 1 << 18
MOST_COMMAS = 1 << 19
MOST_BACKSLASHES = 1 << 21


def json_object(data: bytes) -> dict[str, Any]:
    """The object that a body holds, without the fields that are null. Raises RequestError."""
    at_most(MOST_BRACKETS, data.count(b"[") + data.count(b"{"), "brackets in the body")
    at_most(MOST_COMMAS, data.count(b","), "commas in the body")
    at_most(MOST_BACKSLASHES, data.count(b"\\"), "backslashes in the body")
    try:
        body = json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestError(f"The body is not JSON in UTF-8: {error}.") from None
    except ValueError:  # of Python's own limit
        raise RequestError("A number in the body has thousands of digits.") from None
    if not isinstance(body, dict):
        raise RequestError("The body is not a JSON object.")
    return {key: value for key, value in body.items() if value is not None}


def text_of(value: object, name: str) -> str:
    """`value`, which must be a text that UTF-8 can carry. Raises RequestError."""
    if not isinstance(value, str):
        raise RequestError(f"{name} is missing or is not a text.")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RequestError(f"{name} holds half of a surrogate pair, which is no text.") from None
    return value


def number_of(body: Mapping[str, Any], name: str, *, whole: bool) -> float:
    """The number in the field `name`, an int where it is to be `whole`. Raises RequestError."""
    value = body[name]
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        kind = "a whole number" if whole else "a number"
        raise RequestError(f"{name} is {json.dumps(value)[:40]}, but must be {kind}.")
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        raise RequestError(f"{name} is a number of more than 64 bits.")
    return value if whole else float(value)


def flag_of(body: Mapping[str, Any], name: str, default: bool) -> bool:
    """The switch in the field `name`. Raises RequestError."""
    value = body.get(name, default)
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be true or false.")
    return value


def object_of(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The object in the field `name`, empty where there is none. Raises RequestError."""
    value = body.get(name, {})
    if not isinstance(value, dict):
        raise RequestError(f"{name} must be a JSON object.")
    return value


def list_of(body: Mapping[str, Any], name: str, most: int) -> list[Any]:
    """The list in the field `name` of `most` items, empty where there is none. Raises RequestError."""
    value = body.get(name, [])
    if not isinstance(value, list):
        raise RequestError(f"{name} must be a list.")
    at_most(most, len(value), name)
    return value


def schema_of(value: object, name: str) -> str:
    """The JSON schema `value`, an object, as text. Raises RequestError."""
    if not isinstance(value, dict):
        raise RequestError(f"{name} must be a JSON schema, which is an object.")
    try:
        return text_of(json.dumps(value, ensure_ascii=False), name)
    except RecursionError:
        raise RequestError(f"{name} is nested too deeply.") from None


def stop_of(body: Mapping[str, Any]) -> list[str]:
    """The stop strings: one text or a list of them. Raises RequestError."""
    stop = body.get("stop", [])
    if isinstance(stop, str):
        stop = [stop]
    if not isinstance(stop, list):
        raise RequestError("stop must be a text or a list of texts.")
    at_most(MOST_STOPS, len(stop), "stop strings")
    return [text_of(item, "stop") for item in stop]


def tools_of(body: Mapping[str, Any]) -> list[Tool]:
    """The functions that are offered, in OpenAI's form, which Ollama took over. Raises RequestError."""
    tools = []
    for index, item in enumerate(list_of(body, "tools", MOST_TOOLS)):
        function = item.get("function") if isinstance(item, dict) else None
        if not isinstance(function, dict):
            raise RequestError(
                f"tools[{index}] is no function: only tools of the type function are supported."
            )
        try:
            parameters = json.dumps(function.get("parameters") or {}, ensure_ascii=False)
        except RecursionError:
            raise RequestError(f"The parameters of tools[{index}] are nested too deeply.") from None
        tools.append(
            Tool(
                name=text_of(function.get("name"), f"tools[{index}].function.name"),
                description=text_of(
                    function.get("description") or "", f"tools[{index}].function.description"
                ),
                parameters=text_of(parameters, f"tools[{index}].function.parameters"),
            )
        )
    return tools
