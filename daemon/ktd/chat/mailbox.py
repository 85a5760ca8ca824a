"""The hand-over of a request's events from the engine thread to the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from dataclasses import dataclass, field

from ktd.errors import Stalled
from ktd.types import EngineEvent, Prefilled, Queued, Score, Tokens

# Tokens that are handed over at once: with all alternatives a third of the 4 MiB that gRPC's clients take.
MOST_JOINED = 1024
# Tokens that may wait with their alternatives, 2 KB each.
MOST_SCORED = 1 << 14


@dataclass(slots=True)
class _Joined:
    ids: list[int] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)


class Mailbox:
    """Events of one request, in order.

    Bounded without ever blocking the engine: when the reader is slow, a newer Queued or Prefilled replaces
    the one that still waits, and Tokens join. What waits is never more than the tokens of one answer, and
    with log probabilities never more than MOST_SCORED.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._lock = threading.Lock()
        self._events: deque[EngineEvent | _Joined] = deque()
        self._ready = asyncio.Event()

    def put(self, event: EngineEvent) -> None:
        """Called from the engine thread; does nothing once the loop is gone. Raises Stalled when too much
        waits."""
        with self._lock:
            wake = not self._events
            last = None if wake else self._events[-1]
            if isinstance(event, Tokens):
                if not isinstance(last, _Joined):
                    last = _Joined()
                    self._events.append(last)
                if len(last.scores) >= MOST_SCORED:
                    raise Stalled(f"{MOST_SCORED} tokens of this answer waited to be read: it was ended.")
                last.ids.extend(event.ids)
                last.scores.extend(event.scores)
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
            event = self._events[0]
            if isinstance(event, _Joined):
                ids, scores = event.ids[:MOST_JOINED], event.scores[:MOST_JOINED]
                del event.ids[:MOST_JOINED], event.scores[:MOST_JOINED]
                if event.ids:
                    return Tokens(ids, scores)
                event = Tokens(ids, scores)
            self._events.popleft()
            if not self._events:
                self._ready.clear()
        return event
