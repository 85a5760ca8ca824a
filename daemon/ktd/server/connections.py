"""HTTP connections take a file descriptor each, some a sequence: those on which nothing moves are closed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum, auto
from time import monotonic
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from ktd.server.host import STALL_SECONDS

log = logging.getLogger(__name__)

EVERY = 5.0  # seconds
_TELL_EVERY = 60.0
# Of an answer the kernel keeps about as much for a client that does not read. By itself it keeps megabytes.
SEND_BUFFER = 1 << 16


class Exhausted:
    """The event loop's exception handler: it has thousands of traces a second where nobody can be let in."""

    def __init__(self) -> None:
        self._told = -_TELL_EVERY

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if "accept" not in context["message"] or not isinstance(error, OSError):
            return loop.default_exception_handler(context)
        if monotonic() - self._told >= _TELL_EVERY:
            self._told = monotonic()
            log.error("New HTTP connections wait until others are closed: %s.", error.strerror)


class _State(Enum):
    """What a connection is at."""

    SILENT = auto()  # no request has come whole
    SENDING = auto()  # headers have come, the body has not
    STALLED = auto()  # what is to be sent has not gone
    WORKING = auto()


# Seconds that a connection may be in a state without anything moving. A body may take as long as 16 MiB at 1
# Mbit/s: that some of it comes is not seen.
LONGEST = {
    _State.SILENT: 15.0,
    _State.SENDING: 120.0,
    _State.STALLED: STALL_SECONDS,
    _State.WORKING: float("inf"),
}


@dataclass(frozen=True, slots=True)
class _Place:
    """Of two looks at a connection, equal where nothing moved between them."""

    state: _State
    cycle: RequestResponseCycle | None
    unsent: int


async def close_idle(connections: Collection[object]) -> None:
    """Looks at `connections`, which are uvicorn's and change, for ever."""
    seen: dict[H11Protocol, tuple[_Place, float]] = {}
    while True:
        await asyncio.sleep(EVERY)
        now, before, seen = monotonic(), seen, {}
        for connection in [each for each in connections if isinstance(each, H11Protocol)]:
            place = _place(connection)
            last, since = before.get(connection, (place, now))
            seen[connection] = place, since if last == place else now
            if last != place or now - since < LONGEST[place.state]:
                continue
            if place.state is _State.STALLED:
                client = connection.client[0] if connection.client else "?"
                log.info(
                    "A client at %s read nothing for %.0f s: its connection is closed.", client, now - since
                )
            connection.transport.abort()


def _place(connection: H11Protocol) -> _Place:
    cycle = connection.cycle
    unsent = connection.transport.get_write_buffer_size()
    if unsent:
        return _Place(_State.STALLED, cycle, unsent)
    if cycle is None or cycle.response_complete:
        return _Place(_State.SILENT, cycle, 0)
    return _Place(_State.SENDING if cycle.more_body else _State.WORKING, cycle, 0)
