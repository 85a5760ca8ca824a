"""A stand-in for the model that sees through the cache, and a listener that records."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic, sleep
from types import SimpleNamespace
from typing import cast

import numpy as np
import numpy.typing as npt

from ktd.cache import LatentCache
from ktd.engine import Engine, EngineConfig
from ktd.model import Batch, Model
from ktd.types import (
    Ended,
    EngineEvent,
    Failed,
    FinishReason,
    GenerationRequest,
    Prefilled,
    Priority,
    Queued,
    SamplingParams,
    Score,
    Tokens,
)
from ktd_kernels import Cpu

F32 = npt.NDArray[np.float32]
GREEDY = SamplingParams(temperature=0.0)


class FakeModel:
    """Logits are a hash of all tokens up to the row, read back from the cache through the page table.

    A latent is the token and a number made of all tokens up to it, so a wrong slot, page or position, a page
    given to two sequences or found behind another beginning is noticed. `hook` is called in every step with
    the batch and may raise or wait.
    """

    def __init__(self, vocab_size: int = 64, hook: Callable[[Batch], None] | None = None) -> None:
        self.config = SimpleNamespace(vocab_size=vocab_size, layers=1, latent=2)
        self.cpu = Cpu(threads=1)
        self.devices = ()
        self.hook = hook
        self.steps: list[Batch] = []

    def reserve(self, rows: int, logit_rows: int, cache: LatentCache) -> None:
        self.reserved = (rows, logit_rows)

    def forward(self, batch: Batch, cache: LatentCache, tick: Callable[[float], None] | None = None) -> F32:
        self.steps.append(batch)
        if self.hook:
            self.hook(batch)
        store = cache.layer(0).reshape(-1, 2)
        for row, slot in enumerate(batch.slots):
            before = self._read(batch, row, cache.page_size, int(batch.positions[row]))
            chain = store[before[-1], 1] if len(before) else 0.0
            store[slot] = batch.tokens[row], chain_on(chain, batch.tokens[row])
        if tick:
            tick(0.5)
            tick(1.0)
        rows = []
        for row in batch.logit_rows:
            assert batch.context[row] == batch.positions[row] + 1
            context = store[self._read(batch, row, cache.page_size, int(batch.context[row]))]
            chain = 0.0
            for token, stored in context:
                chain = chain_on(chain, token)
                assert stored == chain, "a latent of another text"
            rows.append(expected_logits([int(token) for token in context[:, 0]], self.config.vocab_size))
        return np.array(rows, np.float32).reshape(len(rows), self.config.vocab_size)

    def _read(self, batch: Batch, row: int, page_size: int, count: int) -> npt.NDArray[np.int64]:
        """Cache slots of the first `count` tokens of the row's sequence."""
        at = np.arange(count)
        pages = batch.page_table[batch.seq_of_row[row], at // page_size].astype(np.int64)
        slots: npt.NDArray[np.int64] = pages * page_size + at % page_size
        return slots


def chain_on(chain: float, token: float) -> float:
    """A number of at most 16 bits, exact in float32, that depends on every token so far."""
    return (int(chain) * 31 + int(token) + 1) % 65521


def expected_logits(context: Sequence[int], vocab_size: int = 64) -> F32:
    digest = hashlib.blake2b(np.asarray(context, np.int64).tobytes(), digest_size=8).digest()
    return np.random.default_rng(int.from_bytes(digest, "big")).standard_normal(vocab_size).astype(np.float32)


def expected_greedy(prompt: Sequence[int], count: int, vocab_size: int = 64) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(expected_logits(tokens, vocab_size).argmax()))
    return tokens[len(prompt) :]


@dataclass
class Recorder:
    """Listens to one request; `action` is called with every event first and may raise."""

    action: Callable[[EngineEvent], None] | None = None
    events: list[EngineEvent] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    done: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: EngineEvent) -> None:
        self.events.append(event)
        self.times.append(monotonic())
        try:
            if self.action:
                self.action(event)
        finally:
            if isinstance(event, (Ended, Failed)):
                self.done.set()

    def wait(self, seconds: float = 60.0) -> Recorder:
        assert self.done.wait(seconds), f"no terminal event; got {self.events[-3:]}"
        return self

    @property
    def tokens(self) -> list[int]:
        return [token for event in self.events if isinstance(event, Tokens) for token in event.ids]

    @property
    def scores(self) -> list[Score]:
        return [score for event in self.events if isinstance(event, Tokens) for score in event.scores]

    @property
    def reason(self) -> FinishReason | None:
        last = self.events[-1]
        return last.reason if isinstance(last, Ended) else None

    @property
    def error(self) -> Exception | None:
        last = self.events[-1]
        return last.error if isinstance(last, Failed) else None

    def check_order(self) -> None:
        """Queued*, Prefilled*, Tokens*, one terminal; the prompt's progress never goes back and ends at its
        total."""
        ranks = {Queued: 0, Prefilled: 1, Tokens: 2, Ended: 3, Failed: 3}
        order = [ranks[type(event)] for event in self.events]
        assert order == sorted(order), self.events
        assert order.count(3) == 1
        assert order[-1] == 3
        progress = [event for event in self.events if isinstance(event, Prefilled)]
        assert [p.done for p in progress] == sorted(p.done for p in progress)
        if 2 in order:
            assert progress[-1].done == progress[-1].total
            assert all(p.done < p.total for p in progress[:-1])


def generation(
    name: str,
    prompt: Sequence[int],
    max_tokens: int = 8,
    sampling: SamplingParams = GREEDY,
    stop: Sequence[int] = (),
    priority: Priority = Priority.NORMAL,
    client: str = "",
) -> GenerationRequest:
    stops = frozenset(stop)
    return GenerationRequest(name, list(prompt), max_tokens, sampling, stops, priority, client=client)


class Clock:
    """Stands in for `time.monotonic`: time passes when a test says so, however busy the machine is."""

    def __init__(self) -> None:
        self._now = 1000.0

    def __call__(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += seconds


def make_engine(
    model: FakeModel | Model, *, check_file: Callable[[], None] = lambda: None, **sizes: int
) -> Engine:
    """Not started. Defaults: context 128, 4 sequences, pages of 4 tokens, f32 cache."""
    defaults = {"context": 128, "max_sequences": 4, "page_size": 4, "chunk_tokens": 16}
    return Engine(cast(Model, model), EngineConfig(**(defaults | sizes), cache_type="f32"), check_file)


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Waits for something that another thread brings about."""
    deadline = monotonic() + seconds
    while not condition():
        assert monotonic() < deadline, "it never happened"
        sleep(0.002)
