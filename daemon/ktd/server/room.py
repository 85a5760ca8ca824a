"""How much of requests is held at once: the model has planned the machine's memory without it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ktd.errors import Busy

# Bytes of all requests that are received or answered: eight of the largest, or hundreds with full contexts.
# They take five times as much memory while they are read.
MOST_HELD = 128 << 20


class Room:
    """Counts bytes of requests. Used from one event loop."""

    def __init__(self) -> None:
        self.held = 0

    def take(self, size: int) -> None:
        """Raises Busy where there is no room for `size` more; what is taken is to be given back."""
        if self.held + size > MOST_HELD:
            raise Busy(f"Requests of {self.held >> 20} MiB are being worked on already; try again later.")
        self.held += size

    @contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Takes room for as long as the block lasts."""
        self.take(size)
        try:
            yield
        finally:
            self.held -= size


class Metered:
    """Counts the bodies of HTTP requests from their arrival to the end of the answer."""

    def __init__(self, app: ASGIApp, room: Room) -> None:
        self._app = app
        self._room = room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            size = len(message.get("body", b""))
            self._room.take(size)
            taken += size
            return message

        try:
            await self._app(scope, counted, send)
        finally:
            self._room.held -= taken
