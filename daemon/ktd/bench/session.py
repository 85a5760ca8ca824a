"""Requests to an engine, timed."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable

import numpy as np

from ktd.engine import Engine
from ktd.errors import KtdError
from ktd.types import Ended, EngineEvent, Failed, GenerationRequest, SamplingParams, Tokens


class Session:
    """Submits requests and waits for their tokens."""

    def __init__(self, engine: Engine, vocab_size: int) -> None:
        self._engine, self._vocab_size = engine, vocab_size
        self._rng = np.random.default_rng(0)
        self._count = 0

    def _request(self, prompt_tokens: int, max_tokens: int) -> GenerationRequest:
        self._count += 1
        return GenerationRequest(
            request_id=f"bench-{self._count}",
            prompt=self._rng.integers(0, self._vocab_size, prompt_tokens).tolist(),
            max_tokens=max_tokens,
            # Random tokens, as the peer's are: greedy text of random weights goes round in a circle, and its
            # few experts would stay in the caches.
            sampling=SamplingParams(temperature=1.0, top_p=1.0, seed=self._count),
            stop_ids=frozenset(),
        )

    def _run(self, sequences: int, prompt_tokens: int, max_tokens: int) -> tuple[float, list[list[float]]]:
        """When `sequences` equal requests were submitted, and when each token of each came."""
        events: queue.Queue[tuple[int, float, EngineEvent]] = queue.Queue()

        def listener(number: int) -> Callable[[EngineEvent], None]:
            return lambda event: events.put((number, time.perf_counter(), event))

        started = 0.0

        def submit_all(event: EngineEvent) -> None:
            nonlocal started
            if isinstance(event, Failed):
                events.put((0, time.perf_counter(), event))
            if isinstance(event, Ended):
                started = time.perf_counter()
                try:
                    for number in range(sequences):
                        self._engine.submit(self._request(prompt_tokens, max_tokens), listener(number))
                except KtdError as error:  # nobody else would hear it on this thread
                    events.put((0, started, Failed(error)))

        # A first request ends; from its last event, on the engine's thread, the others start in one step.
        self._engine.submit(self._request(1, 1), submit_all)
        times: list[list[float]] = [[] for _ in range(sequences)]
        ended = 0
        while ended < sequences:
            number, when, event = events.get()
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Tokens):
                times[number] += [when] * len(event.ids)
            ended += isinstance(event, Ended)
        return started, times

    def prefill(self, tokens: int) -> float:
        """Seconds until the first token after a prompt."""
        started, times = self._run(1, tokens, 1)
        return times[0][0] - started

    def read(self, tokens: int) -> float:
        """As `prefill`, with nothing before it: for profiles, which that would be in."""
        events: queue.Queue[EngineEvent] = queue.Queue()
        started = time.perf_counter()
        self._engine.submit(self._request(tokens, 1), events.put)
        seconds = None
        while not isinstance(event := events.get(), Ended):
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Tokens) and seconds is None:
                seconds = time.perf_counter() - started
        return seconds or time.perf_counter() - started

    def decode(self, sequences: int, context: int, tokens: int) -> float:
        """Mean seconds of a step while all sequences write behind prompts of `context` tokens."""
        _, times = self._run(sequences, context, tokens)
        first, last = max(own[0] for own in times), min(own[-1] for own in times)
        steps = sum(first < when <= last for own in times for when in own) / sequences
        return (last - first) / steps
