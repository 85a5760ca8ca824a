"""Requests become values without holding up the event loop, which is everybody's.

What is large is read in a thread of its own; what would keep even that thread from letting others run,
because one call of a library makes millions of objects, is refused before.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from google.protobuf.message import DecodeError

from ktd.chat.request import MOST_BIASES, MOST_MESSAGES, MOST_STOPS, MOST_TOOLS, at_most
from ktd.errors import RequestError
from ktd_proto.v1 import engine_pb2 as pb

# Bytes that are read in the loop: at the very most a few milliseconds.
SMALL = 1 << 15
# Of each field that has no limit of its own: there is one of it, or it is unknown.
_MOST_OTHERS = 1 << 16
_MESSAGES, _SAMPLING, _TOOLS = 2, 3, 8
# By the field it stands in (0: the request) and its own number.
_MOST = {
    (0, _MESSAGES): (MOST_MESSAGES, "messages"),
    (_MESSAGES, 5): (MOST_MESSAGES, "tool calls"),
    (0, _TOOLS): (MOST_TOOLS, "tools"),
    (_SAMPLING, 10): (MOST_STOPS, "stop strings"),
    (_SAMPLING, 11): (MOST_BIASES, "tokens in logit_bias"),
}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

_Value = TypeVar("_Value")
_threads = ThreadPoolExecutor(2, "read")


async def read(data: bytes, how: Callable[[bytes], _Value]) -> _Value:
    """`how(data)`, in a thread if `data` is large. Raises what it raises."""
    if len(data) <= SMALL:
        return how(data)
    return await asyncio.get_running_loop().run_in_executor(_threads, how, data)


def chat_request(data: bytes) -> pb.ChatRequest:
    """The message in `data`. Raises RequestError where it is none, or holds too much."""
    try:
        if len(data) > SMALL:
            _count(data)
        return pb.ChatRequest.FromString(data)
    except DecodeError:
        raise RequestError("The request is not a ktd.v1.ChatRequest, or a text in it is not UTF-8.") from None


def _count(data: bytes) -> None:
    """Raises RequestError when there is too much of a field, DecodeError where fields do not follow."""
    counts = Counter[tuple[int, int]]()
    open_: list[tuple[int, int, int]] = [(0, 0, len(data))]
    while open_:
        parent, at, end = open_.pop()
        while at < end:
            key, at = _varint(data, at)
            field, kind = key >> 3, key & 7
            counts[parent, field] += 1
            most, what = _MOST.get((parent, field), (_MOST_OTHERS, "fields of one kind"))
            at_most(most, counts[parent, field], what)
            if kind == _VARINT:
                _, at = _varint(data, at)
            elif kind == _BYTES:
                size, at = _varint(data, at)
                if parent == 0 and field in (_MESSAGES, _SAMPLING):
                    open_.append((field, at, min(at + size, end)))
                at += size
            elif kind in (_FIXED64, _FIXED32):
                at += 8 if kind == _FIXED64 else 4
            else:
                raise DecodeError  # groups: nothing of ours, and each may hold as many as there is room for


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise DecodeError
