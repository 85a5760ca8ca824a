"""The hand-over of a request's events from the engine thread to the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections import deque

from ktd.types import EngineEvent, Prefilled, Queued, Tokens


class Mailbox:
    """Events of one request, in order.

    Bounded without ever blocking the engine: when the reader is slow, a newer Queued or Prefilled replaces
    the one that still waits, and Tokens join. What waits is never more than the token ids of one answer.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._events: deque[EngineEvent | list[int]] = deque()
        self._ready = asyncio.Event()

    def put(self, event: EngineEvent) -> None:
        """Called from the engine thread; does nothing once the loop is gone."""
        with self._lock:
            wake = not self._events
            last = None if wake else self._events[-1]
            if isinstance(event, Tokens):
                if isinstance(last, list):
                    last.extend(event.ids)
                else:
                    self._events.append(list(event.ids))
            elif isinstance(event, Queued | Prefilled) and type(last) is type(event):
                self._events[-1] = event
            else:
                self._events.append(event)
        if wake and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._ready.set)

    async def get(self, patience: float | None) -> EngineEvent | None:
        """The next event; None when `patience` seconds passed without one."""
        if not self._ready.is_set():
            try:
                async with asyncio.timeout(patience):
                    await self._ready.wait()
            except TimeoutError:
                return None
        with self._lock:
            event = self._events.popleft()
            if not self._events:
                self._ready.clear()
        return Tokens(event) if isinstance(event, list) else event
