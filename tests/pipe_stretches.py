"""Times every stretch in which the Pipe holds the event loop: from one real wait to the next.

Tests import it; `make bench-pipe` appends it to the Pipe's own source, so that it measures inside Open WebUI.
Therefore it has no `from __future__` line and imports nothing of the tests.
"""

import contextlib
import functools
import time
from collections.abc import AsyncGenerator, Awaitable, Generator
from typing import Any, NamedTuple


class Stretch(NamedTuple):
    """Seconds on the clock and of the processor; `first` says that no chunk had come before."""

    first: bool
    wall: float
    cpu: float


class Timed:
    """Awaits what it is given and notes how long each step of it takes."""

    def __init__(self, awaitable: Awaitable[Any], first: bool, stretches: list[Stretch]) -> None:
        self._awaitable, self._first, self._stretches = awaitable, first, stretches

    def __await__(self) -> Generator[Any, Any, Any]:
        steps: Any = self._awaitable.__await__()
        resume, value = steps.send, None
        while True:
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                waited_for = resume(value)
            except StopIteration as end:
                return end.value
            finally:
                took = time.perf_counter() - wall, time.thread_time() - cpu
                self._stretches.append(Stretch(self._first, *took))
            try:
                value = yield waited_for
                resume = steps.send
            except BaseException as error:
                resume, value = steps.throw, error


def measured(pipe_class: Any, stretches: list[Stretch]) -> Any:
    """The Pipe with a note in `stretches` for every step of its answers."""

    class Measured(pipe_class):  # type: ignore[misc]
        @functools.wraps(pipe_class.pipe)
        async def pipe(self, body: Any, **named: Any) -> Any:
            answer = await Timed(super().pipe(body, **named), True, stretches)
            return answer if isinstance(answer, dict) else self._timed_chunks(answer)

        async def _timed_chunks(self, answer: Any) -> AsyncGenerator[Any]:
            first = True
            async with contextlib.aclosing(answer):
                while True:
                    try:
                        chunk = await Timed(anext(answer), first, stretches)
                    except StopAsyncIteration:
                        return
                    first = False
                    yield chunk

    return Measured
