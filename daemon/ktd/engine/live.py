"""A request while the engine has it: its listener, sampler, clock, and what the listener was told."""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic

from ktd.engine.sampler import Sampler
from ktd.errors import KtdError, Stalled, Unavailable
from ktd.sched import Sequence
from ktd.types import EngineEvent, GenerationRequest, Prefilled, Queued, Timings

log = logging.getLogger(__name__)
Listener = Callable[[EngineEvent], None]


class LiveRequest:
    """Used by the engine thread alone once it is submitted. Times are seconds of the monotonic clock."""

    def __init__(self, request: GenerationRequest, listener: Listener) -> None:
        self.request = request
        self.sequence = Sequence(request)
        self.sampler = Sampler(request)
        self.deaf: KtdError | None = None  # why its listener takes no more
        self._listener = listener
        self._submitted = monotonic()
        self._admitted: float | None = None
        self._first_token: float | None = None
        self._told_position: int | None = None
        self._told_done = -1
        self._told_prefill = 0.0

    def tell(self, event: EngineEvent) -> None:
        """Calls the listener. That it raises is remembered; it must not hurt the others."""
        try:
            self._listener(event)
        except Stalled as error:
            log.info("Request %s: %s", self.request.request_id, error)
            self.deaf = error
        except Exception:
            log.exception("the listener of request %s failed", self.request.request_id)
            self.deaf = Unavailable("The listener of this request failed.")

    def queued(self, position: int) -> None:
        """Tells the place in the queue when it changed. A preempted request is silent: it has begun."""
        if self._admitted is None and position != self._told_position:
            self._told_position = position
            self.tell(Queued(position))

    def started(self) -> None:
        """The request was admitted, perhaps not for the first time."""
        if self._admitted is None:
            self._admitted = monotonic()
            self.prefilled(self.sequence.cached)

    def prefilled(self, done: int, *, every: float = 0.0) -> None:
        """Tells the progress of the prompt, unless told within the last `every` seconds or already
        drawing."""
        now, total = monotonic(), self.sequence.prompt_tokens
        if self.sequence.drawn or self._admitted is None or now - self._told_prefill < every:
            return
        done = max(done, self._told_done)  # a preempted prompt is read again: no steps back
        self._told_done, self._told_prefill = done, now
        cached = self.sequence.cached
        seconds = now - self._admitted
        rate = (done - cached) / seconds if seconds > 0 and done > cached else 0.0
        self.tell(Prefilled(done, total, cached, rate))

    def drew(self, token: int) -> None:
        """A token was drawn; the first one ends the reading of the prompt."""
        if self._first_token is None:
            self._first_token = monotonic()
        self.sequence.tokens.append(token)

    def timings(self) -> Timings:
        """Seconds in the queue, reading and writing, up to now."""
        now = monotonic()
        admitted = now if self._admitted is None else self._admitted
        first = now if self._first_token is None else self._first_token
        return Timings(admitted - self._submitted, first - admitted, now - first)
