"""In what order clients that wait are served: one client's many requests are only in each other's way."""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import TypeVar

_Item = TypeVar("_Item")
_REMEMBERED = 1024  # clients; one that is forgotten counts as new


class Turns:
    """Remembers who was served when. Not thread-safe."""

    def __init__(self) -> None:
        self._served: dict[str, int] = {}  # the number of the last time; ascending
        self._times = 0

    def serve(self, client: str) -> None:
        """One of the client's requests is served now."""
        self._times += 1
        self._served.pop(client, None)
        self._served[client] = self._times
        if len(self._served) > _REMEMBERED:
            del self._served[next(iter(self._served))]

    def order(
        self,
        waiting: Iterable[_Item],
        running: Iterable[str],
        *,
        client: Callable[[_Item], str],
        rank: Callable[[_Item], int],
    ) -> list[_Item]:
        """`waiting`, in order of arrival, in the order in which they are to be served; `running`: whose are
        being served.

        A lower rank comes first. Among equals next is whose client has the fewest running or in front, then
        who has not been served for the longest time. A client's own keep their order.
        """
        own: dict[tuple[int, str], deque[tuple[int, _Item]]] = {}
        for place, item in enumerate(waiting):
            own.setdefault((rank(item), client(item)), deque()).append((place, item))
        have, served, now = Counter(running), dict(self._served), self._times
        order = []
        for level in sorted({level for level, _ in own}):
            heads = [
                (have[name], served.get(name, 0), items[0][0], name)
                for (of, name), items in own.items()
                if of == level
            ]
            heapq.heapify(heads)
            while heads:
                *_, name = heapq.heappop(heads)
                items = own[level, name]
                order.append(items.popleft()[1])
                have[name] += 1
                now += 1
                served[name] = now
                if items:
                    heapq.heappush(heads, (have[name], now, items[0][0], name))
        return order
