"""Small requests of gRPC, read by functions of ours: to what is none of them it would answer INTERNAL or
UNKNOWN with a trace in the log, and it would read 16 MiB of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from ktd.errors import RequestError
from ktd.server.reading import SMALL
from ktd.server.status import sentence_of, status_of

Context = grpc.aio.ServicerContext[Any, Any]
_Request = TypeVar("_Request", bound=Message)


def parser(kind: type[_Request]) -> Callable[[bytes], _Request | DecodeError]:
    """Reads requests, of which none is large. What is none becomes a DecodeError, for check_decoded."""

    def parse(data: bytes) -> _Request | DecodeError:
        if len(data) > SMALL:
            return DecodeError()
        try:
            return kind.FromString(data)
        except DecodeError as error:
            return error

    return parse


async def check_decoded(request: object, kind: type[Message], context: Context) -> None:
    """Ends the call with one sentence where `request` was not a `kind`: that is the client's mistake."""
    if isinstance(request, DecodeError):
        error = _undecoded(kind)
        await context.abort(status_of(error).grpc, sentence_of(error))


def _undecoded(kind: type[Message]) -> RequestError:
    return RequestError(f"The request is not a {kind.DESCRIPTOR.full_name}, or a text in it is not UTF-8.")
