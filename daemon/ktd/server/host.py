"""What the doors share: the model once it is loaded, the state of the daemon, and its counters."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Protocol

from ktd.chat import ChatService, ServedModel
from ktd.chat.interfaces import Generator
from ktd.chat.request import RequestDefaults
from ktd.errors import EngineFailure, Unavailable
from ktd.server.metrics import Metrics
from ktd.server.room import Room
from ktd.types import ChatEvent, ChatRequest, EngineStatus

# A client that takes nothing of its answer for so long, while all buffers are full, loses it: whatever it is
# doing, others wait for its sequence.
STALL_SECONDS = 60.0


class State(Enum):
    """Where the daemon is in its life."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    FAILED = "failed"


class Engine(Generator, Protocol):
    """The engine as the daemon drives it (`ktd.engine.Engine`)."""

    @property
    def death(self) -> Future[EngineFailure]:
        """Done when the engine failed for good, with the reason."""

    def start(self) -> None: ...
    def status(self) -> EngineStatus: ...
    def drain(self, seconds: float) -> bool: ...
    def stop(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model that is ready to answer. `isa` and `threads` are what the kernels run with."""

    chat: ChatService
    engine: Engine
    isa: str
    threads: int


@dataclass(slots=True)
class Host:
    """One daemon. Lives in the event loop; only `load_progress` is also written from the loading thread."""

    served: ServedModel
    defaults: RequestDefaults = field(default_factory=RequestDefaults)
    api_key: str | None = None
    state: State = State.LOADING
    message: str = "The model is being loaded."
    load_progress: float = 0.0
    loaded: Loaded | None = None
    metrics: Metrics = field(default_factory=Metrics)
    room: Room = field(default_factory=Room)
    started: float = field(default_factory=time.monotonic)

    def ready(self, loaded: Loaded) -> None:
        """The model is loaded: requests are answered from now on."""
        self.loaded, self.state, self.message, self.load_progress = loaded, State.READY, "", 1.0
        self.metrics.watch(loaded.engine.status)

    def turn_away(self, state: State, message: str) -> None:
        """New requests are refused with `message` from now on."""
        self.state, self.message = state, message

    async def chat(self, request: ChatRequest, peer: str) -> AsyncGenerator[ChatEvent, None]:
        """As ChatService.chat, counted. `peer` asks where the request does not say who. Raises Unavailable
        unless the daemon is ready."""
        if not request.client:
            request = replace(request, client=peer)
        if self.state is not State.READY or self.loaded is None:
            progress = f" ({self.load_progress:.0%})" if self.state is State.LOADING else ""
            raise Unavailable(f"{self.message}{progress}")
        with self.metrics.request() as tally:
            async with aclosing(self.loaded.chat.chat(request)) as events:
                async for event in events:
                    tally.see(event)
                    yield event

    def engine_status(self) -> EngineStatus:
        """The engine's figures; zeros before it is there."""
        return self.loaded.engine.status() if self.loaded else EngineStatus(0, 0, 0, 0, 0, 0, 0)
