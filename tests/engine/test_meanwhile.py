"""While a long prompt is read, sequences that decode go on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from kit_engine import Clock, FakeModel, Recorder, expected_greedy, generation, make_engine

from ktd.cache import LatentCache
from ktd.engine import Engine
from ktd.errors import EngineFailure, Unavailable
from ktd.model import Batch
from ktd.types import EngineEvent, Tokens

SHORT, LONG = [5, 9, 2, 33, 7], [int(t) for t in np.random.default_rng(1).integers(0, 64, 100)]


class Deep(FakeModel):
    """40 layers of `layer` seconds: a step of more than 32 rows calls `between` before each. Other steps take
    a millisecond."""

    def __init__(self, clock: Clock, between: Callable[[], None], layer: float = 0.002) -> None:
        super().__init__()
        self._clock, self._between, self._layer = clock, between, layer

    def forward(self, batch: Batch, cache: LatentCache, tick: Callable[[float], None] | None = None):  # type: ignore[no-untyped-def]
        if tick is not None and len(batch.tokens) > 32:
            for layer in range(40):
                self._between()
                self._clock.advance(self._layer)
                tick(layer / 40)
        else:
            self._clock.advance(0.001)
        return super().forward(batch, cache, tick)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("ktd.engine.step.monotonic", clock)
    return clock


@pytest.fixture
def begun() -> Iterator[list[Engine]]:
    engines: list[Engine] = []
    yield engines
    for engine in engines:
        engine.stop()
        engine.check_integrity()
        assert engine.status().pages_free == engine.status().pages_total


def ready(begun: list[Engine], model: FakeModel, **sizes: int) -> Engine:
    engine = make_engine(model, **{"context": 256, "chunk_tokens": 128, **sizes})
    begun.append(engine)
    engine.start()
    return engine


def with_its_third_token(act: Callable[[], None]) -> Recorder:
    """Calls `act` while the engine still has the request."""

    def listen(event: EngineEvent) -> None:
        if isinstance(event, Tokens) and len(heard.tokens) == 3:
            act()

    heard = Recorder(listen)
    return heard


@pytest.mark.parametrize(("layer", "turns"), [(0.002, 39), (0.0005, 9)])
def test_tokens_come_while_a_long_prompt_is_read(
    begun: list[Engine], clock: Clock, layer: float, turns: int
) -> None:
    """For a third of the time, or a step after each layer."""
    counts: list[int] = []
    a, b = with_its_third_token(lambda: engine.submit(generation("b", LONG, 5), b)), Recorder()
    model = Deep(clock, lambda: counts.append(len(a.tokens)), layer)
    engine = ready(begun, model)
    engine.submit(generation("a", SHORT, 200), a)
    for heard in (a, b):
        heard.wait().check_order()
    assert counts[-1] - counts[0] == turns
    assert a.tokens == expected_greedy(SHORT, 200)
    assert b.tokens == expected_greedy(LONG, 5)
    long = [batch for batch in model.steps if len(batch.tokens) > 32]
    assert [len(batch.tokens) for batch in long] == [100]


def test_a_short_prompt_shares_its_step(begun: list[Engine]) -> None:
    a, b = with_its_third_token(lambda: engine.submit(generation("b", LONG[:32], 5), b)), Recorder()
    model = FakeModel()
    engine = ready(begun, model)
    engine.submit(generation("a", SHORT, 200), a)
    assert b.wait().tokens == expected_greedy(LONG[:32], 5)
    a.wait()
    assert 33 in [len(batch.tokens) for batch in model.steps]


def test_ends_and_aborts_between_the_layers(begun: list[Engine], clock: Clock) -> None:
    """Each is the sequence's own: the long prompt and the others go on."""
    long = Recorder()
    heard = {name: Recorder() for name in ("ends", "aborted")}
    heard["stays"] = with_its_third_token(lambda: engine.submit(generation("long", LONG, 5), long))
    at_abort: list[int] = []
    all_there = threading.Event()

    def between() -> None:
        if heard["ends"].done.is_set() and not at_abort:
            engine.abort("aborted")
            at_abort.append(len(heard["aborted"].tokens))

    model = Deep(clock, between)
    model.hook = lambda batch: all_there.wait(60)
    engine = ready(begun, model)
    for name, count in (("ends", 12), ("aborted", 200), ("stays", 200)):
        engine.submit(generation(name, [*SHORT, len(name)], count), heard[name])
    all_there.set()
    assert long.wait().tokens == expected_greedy(LONG, 5)
    assert heard["ends"].wait().tokens == expected_greedy([*SHORT, 4], 12)
    assert isinstance(heard["aborted"].wait().error, Unavailable)
    assert len(heard["aborted"].tokens) == at_abort[0]
    assert heard["stays"].wait().tokens == expected_greedy([*SHORT, 5], 200)


def test_a_fault_between_the_layers_ends_those_it_touches(begun: list[Engine], clock: Clock) -> None:
    a, b = with_its_third_token(lambda: engine.submit(generation("b", LONG, 1), b)), Recorder()
    reading = False

    def between() -> None:
        nonlocal reading
        reading = True

    def hook(batch: Batch) -> None:
        if reading and len(batch.tokens) == 1:
            raise ZeroDivisionError("a kernel broke")

    model = Deep(clock, between)
    model.hook = hook
    engine = ready(begun, model)
    engine.submit(generation("a", SHORT, 200), a)
    assert isinstance(a.wait().error, EngineFailure)
    assert b.wait().tokens == expected_greedy(LONG, 1)


def test_nobody_is_preempted_between_the_layers(begun: list[Engine], clock: Clock) -> None:
    """Of 31 pages of 4 tokens the long prompt has 25: who needs a seventh waits for the end of the step."""
    counts: list[int] = []
    b = Recorder()

    def submit(event: EngineEvent) -> None:
        if isinstance(event, Tokens) and len(a.tokens) == 2:
            engine.submit(generation("b", LONG, 3), b)

    a = Recorder(submit)
    engine = ready(begun, Deep(clock, lambda: counts.append(len(a.tokens))), context=120, pages=31)
    engine.submit(generation("a", SHORT, 100), a)
    assert b.wait().tokens == expected_greedy(LONG, 3)
    assert a.wait().tokens == expected_greedy(SHORT, 100)
    first = counts[:40]  # b, the last to come, is preempted afterwards and read again
    assert first[0] < first[-1] == 4 * 6 - len(SHORT) + 1
