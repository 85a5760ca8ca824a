"""The line in front of the threads that make prompts of requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from ktd.errors import Busy
from ktd.turns import Turns


@dataclass(slots=True, eq=False)
class Place:
    """One request's place; `called` is done when it is its turn."""

    client: str
    low: bool
    called: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Line:
    """Serves `at_once` at the same time, clients in turns, and holds `most`. Used from one event loop."""

    def __init__(self, at_once: int, most: int) -> None:
        self._at_once, self._most = at_once, most
        self._turns = Turns()
        self._inside: set[Place] = set()
        self._waiting: list[Place] = []
        self._served: list[Place] = []

    @contextmanager
    def place(self, client: str, low: bool) -> Iterator[Place]:
        """A place until it is left. Raises Busy where there is none, unless another client has more that
        wait: then the last of these gets Busy from its `turn`."""
        place = Place(client, low)
        if len(self._inside) >= self._most:
            last = self._in_turn([*self._waiting, place])[-1]
            busy = Busy(f"{self._most} prompts are being prepared already; try again later.")
            if last is place:
                raise busy
            self._inside.remove(last)
            self._waiting.remove(last)
            if not last.called.done():
                last.called.set_exception(busy)
        self._inside.add(place)
        try:
            yield place
        finally:
            self._inside.discard(place)

    @asynccontextmanager
    async def turn(self, place: Place) -> AsyncIterator[None]:
        """Waits for the turn of a place, which ends with the block. Raises Busy as `place` says."""
        self._waiting.append(place)
        self._call()
        try:
            await place.called
            yield
        finally:
            if place in self._waiting:
                self._waiting.remove(place)
            elif place in self._served:
                self._served.remove(place)
                self._call()

    def _call(self) -> None:
        while self._waiting and len(self._served) < self._at_once:
            place = self._in_turn(self._waiting)[0]
            self._waiting.remove(place)
            self._served.append(place)
            self._turns.serve(place.client)
            if not place.called.done():  # whoever gave up leaves the line when it comes to run
                place.called.set_result(None)

    def _in_turn(self, waiting: list[Place]) -> list[Place]:
        served = [place.client for place in self._served]
        return self._turns.order(waiting, served, client=lambda p: p.client, rank=lambda p: p.low)
