"""Requests through the step loop on a stand-in model: order of events, ends, aborts, faults, drain."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from time import sleep

import pytest
from kit_engine import (
    Clock,
    FakeModel,
    Recorder,
    expected_greedy,
    generation,
    make_engine,
    until,
)

from ktd.cache import BlockPool
from ktd.engine import Engine, EngineConfig
from ktd.errors import (
    Busy,
    ContextExceeded,
    DeviceLost,
    EngineFailure,
    FileLost,
    RequestError,
    SettingsError,
    Stalled,
    Unavailable,
)
from ktd.model import Batch
from ktd.sched import Scheduler, Sequence
from ktd.types import Ended, EngineEvent, FinishReason, Prefilled, Priority, Queued, SamplingParams, Tokens

PROMPT = [5, 9, 2, 33, 7, 1, 60, 12, 40]


class Gate:
    """Holds the model back until opened; `waiting` is set while it is held."""

    def __init__(self) -> None:
        self.waiting = threading.Event()
        self._open = threading.Event()

    def __call__(self, batch: Batch) -> None:
        self.waiting.set()
        assert self._open.wait(30)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def started() -> Iterator[list[Engine]]:
    """Engines put in this list are stopped at the end, and their pages checked."""
    engines: list[Engine] = []
    yield engines
    for engine in engines:
        engine.stop()
        engine.check_integrity()
        status = engine.status()
        assert (status.running, status.waiting, status.pages_free) == (0, 0, status.pages_total)


def start(started: list[Engine], model: FakeModel, **sizes: int) -> Engine:
    engine = make_engine(model, **sizes)
    started.append(engine)
    engine.start()
    return engine


def test_greedy_tokens_and_order_of_events(started: list[Engine]) -> None:
    engine = start(started, FakeModel())
    heard = Recorder()
    engine.submit(generation("a", PROMPT, 20), heard)
    heard.wait().check_order()
    assert heard.tokens == expected_greedy(PROMPT, 20)
    assert heard.reason is FinishReason.LENGTH
    status = engine.status()
    assert status.prompt_tokens_total == len(PROMPT)
    assert status.completion_tokens_total == 20
    assert status.steps_total == 20


def test_stop_token_ends_and_is_not_published(started: list[Engine]) -> None:
    engine = start(started, FakeModel())
    drawn = expected_greedy(PROMPT, 6)
    stop = drawn[5]
    heard = Recorder()
    engine.submit(generation("a", PROMPT, 20, stop=[stop]), heard)
    heard.wait()
    assert heard.tokens == drawn[: drawn.index(stop)]
    assert heard.reason is FinishReason.STOP


def test_many_requests_share_steps_and_draw_what_they_draw_alone(started: list[Engine]) -> None:
    model = FakeModel()
    engine = start(started, model, max_sequences=4)
    prompts = [[i, *PROMPT[: 1 + i % 9]] for i in range(20)]
    heard = [Recorder() for _ in prompts]
    for i, prompt in enumerate(prompts):
        engine.submit(generation(str(i), prompt, 5 + i), heard[i])
    for i, prompt in enumerate(prompts):
        heard[i].wait().check_order()
        assert heard[i].tokens == expected_greedy(prompt, 5 + i)
    assert max(len(batch.page_table) for batch in model.steps) == 4
    mixed = [batch for batch in model.steps if len(set(batch.seq_of_row)) < len(batch.tokens)]
    assert any(len(batch.page_table) > 1 for batch in mixed), "no step mixed decode rows with a prompt"


def test_long_prompt_is_read_in_chunks_with_the_last_progress_before_the_first_token(
    started: list[Engine],
) -> None:
    model = FakeModel()
    engine = start(started, model, chunk_tokens=16)
    heard = Recorder()
    prompt = [i % 64 for i in range(100)]
    engine.submit(generation("a", prompt, 3), heard)
    heard.wait().check_order()
    assert [len(batch.tokens) for batch in model.steps] == [16] * 6 + [4, 1, 1]
    assert heard.tokens == expected_greedy(prompt, 3)


def test_progress_is_told_every_second_even_within_a_step(
    started: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    for place in ("ktd.engine.step", "ktd.engine.live", "kit_engine"):
        monkeypatch.setattr(f"{place}.monotonic", clock)
    model = FakeModel(hook=lambda batch: clock.advance(0.95))
    engine = start(started, model, chunk_tokens=64)
    heard = Recorder()
    engine.submit(generation("a", [1] * 120, 1), heard)
    heard.wait().check_order()
    gaps = [b - a for a, b in zip(heard.times, heard.times[1:], strict=False)]
    assert max(gaps) < 1
    halves = [event.done for event in heard.events if isinstance(event, Prefilled)]
    assert halves[0] == 0
    assert 32 in halves  # half of the first chunk, told while it ran
    assert all(event.tokens_per_second > 0 for event in heard.events[2:] if isinstance(event, Prefilled))


def test_a_prompt_seen_before_is_found_in_the_cache(started: list[Engine]) -> None:
    model = FakeModel()
    engine = start(started, model, page_size=4)
    first, second = Recorder(), Recorder()
    engine.submit(generation("a", PROMPT, 4), first)
    first.wait()
    before = len(model.steps)
    longer = [*PROMPT, *first.tokens, 3]
    engine.submit(generation("b", longer, 4), second)
    second.wait().check_order()
    assert second.tokens == expected_greedy(longer, 4)
    # 9 + 4 tokens were kept (the last one drawn was never computed): 3 whole pages of 4.
    assert len(model.steps[before].tokens) == len(longer) - 12
    progress = [event for event in second.events if isinstance(event, Prefilled)]
    assert {event.cached for event in progress} == {12}
    assert progress[0].done == 12


def test_a_whole_cached_prompt_still_computes_one_token(started: list[Engine]) -> None:
    engine = start(started, FakeModel(), page_size=4)
    prompt = PROMPT[:8]
    for name in "ab":
        heard = Recorder()
        engine.submit(generation(name, prompt, 3), heard)
        assert heard.wait().tokens == expected_greedy(prompt, 3)


def test_a_page_is_found_only_behind_the_same_beginning(started: list[Engine]) -> None:
    """Three texts whose second page is alike: after another first page it holds other latents."""
    engine = start(started, FakeModel(), page_size=4)
    x, y, p, q = [1] * 4, [2] * 4, [3] * 4, [4] * 4
    for name, prompt in [("a", [*x, *y, 9]), ("b", [*p, *q, 9]), ("c", [*p, *y, 9])]:
        heard = Recorder()
        engine.submit(generation(name, prompt, 3), heard)
        assert heard.wait().tokens == expected_greedy(prompt, 3)


def test_a_step_that_nobody_wants_is_given_up(started: list[Engine]) -> None:
    """An abort while a prompt is read does not wait for the chunk to end."""
    engines: list[Engine] = []

    def hook(batch: Batch) -> None:
        for name in "ab":
            engines[0].abort(name)

    engines.append(start(started, FakeModel(hook=hook)))
    heard = [Recorder(), Recorder()]
    for name, recorder in zip("ab", heard, strict=True):
        engines[0].submit(generation(name, PROMPT, 5), recorder)
    for recorder in heard:
        recorder.wait().check_order()
        assert isinstance(recorder.error, Unavailable)
    assert engines[0].status().steps_total == 0


def test_abort_frees_a_running_request_before_its_next_step(started: list[Engine]) -> None:
    model = FakeModel()
    engine = start(started, model)
    heard = Recorder()

    def abort_at_third(event: EngineEvent) -> None:
        if isinstance(event, Tokens) and len(heard.tokens) == 3:
            engine.abort("a")

    heard.action = abort_at_third
    engine.submit(generation("a", PROMPT, 50), heard)
    heard.wait().check_order()
    assert len(heard.tokens) == 3
    assert isinstance(heard.error, Unavailable)
    assert str(heard.error) == "cancelled"
    assert len(model.steps) == 3
    engine.abort("a")
    engine.abort("never submitted")


def test_abort_of_waiting_requests_and_of_one_being_read(started: list[Engine]) -> None:
    gate = Gate()
    model = FakeModel(hook=gate)
    engine = start(started, model, max_sequences=1, chunk_tokens=4)
    reading, waiting, last = Recorder(), Recorder(), Recorder()
    engine.submit(generation("reading", PROMPT, 5), reading)
    assert gate.waiting.wait(10)
    engine.submit(generation("waiting", PROMPT, 5), waiting)
    engine.submit(generation("last", PROMPT, 5), last)
    engine.abort("waiting")
    engine.abort("reading")
    gate.open()
    assert last.wait().tokens == expected_greedy(PROMPT, 5)
    for heard in (reading, waiting):
        heard.wait().check_order()
        assert isinstance(heard.error, Unavailable)
        assert heard.tokens == []


def test_queue_positions_are_told_as_they_change(started: list[Engine]) -> None:
    gate = Gate()
    engine = start(started, FakeModel(hook=gate), max_sequences=1)
    heard = [Recorder() for _ in range(3)]
    engine.submit(generation("0", PROMPT, 2), heard[0])
    assert gate.waiting.wait(10)
    engine.submit(generation("1", PROMPT, 2), heard[1])
    engine.submit(generation("2", PROMPT, 2), heard[2])
    gate.open()
    positions = []
    for recorder in heard:
        recorder.wait().check_order()
        positions.append([event.position for event in recorder.events if isinstance(event, Queued)])
    assert positions == [[], [0], [1, 0]]


def test_low_priority_waits_for_every_normal_request(started: list[Engine]) -> None:
    gate = Gate()
    engine = start(started, FakeModel(hook=gate), max_sequences=1)
    ends: list[str] = []
    heard = {}
    for name, priority in [("first", Priority.NORMAL), ("low", Priority.LOW), ("normal", Priority.NORMAL)]:
        heard[name] = Recorder(
            lambda event, name=name: ends.append(name) if isinstance(event, Tokens) else None  # type: ignore[misc]
        )
        engine.submit(generation(name, PROMPT, 1, priority=priority), heard[name])
        assert gate.waiting.wait(10)
    gate.open()
    for recorder in heard.values():
        recorder.wait()
    assert ends == ["first", "normal", "low"]


def test_contexts_of_one_page_fill_every_place(started: list[Engine]) -> None:
    gate = Gate()
    model = FakeModel(hook=gate)
    engine = start(started, model, context=4, page_size=4, max_sequences=4)
    heard = [Recorder() for _ in range(4)]
    for i, recorder in enumerate(heard):
        engine.submit(generation(str(i), [i, 7], 2), recorder)
        assert gate.waiting.wait(10)
    gate.open()
    for recorder in heard:
        recorder.wait()
    assert max(len(batch.page_table) for batch in model.steps) == 4


def test_full_queue_is_busy(started: list[Engine]) -> None:
    gate = Gate()
    engine = start(started, FakeModel(hook=gate), max_sequences=1, queue_limit=2)
    heard = [Recorder() for _ in range(3)]
    for i, recorder in enumerate(heard):
        engine.submit(generation(str(i), PROMPT, 1), recorder)
    with pytest.raises(Busy, match="2 requests are waiting"):
        engine.submit(generation("one too many", PROMPT, 1), Recorder())
    gate.open()
    for recorder in heard:
        recorder.wait()
    engine.submit(generation("later", PROMPT, 1), heard[0])


def test_in_a_full_queue_whoever_has_most_gives_way(started: list[Engine]) -> None:
    gate = Gate()
    engine = start(started, FakeModel(hook=gate), max_sequences=1, queue_limit=4)
    heard = {name: Recorder() for name in ("a0", "a1", "a2", "a3", "a4", "b0", "b1")}

    def submit(name: str, recorder: Recorder) -> None:
        engine.submit(generation(name, PROMPT, 1, client=name[0]), recorder)

    submit("a0", heard["a0"])
    assert gate.waiting.wait(10)
    for name in list(heard)[1:]:
        submit(name, heard[name])
    for name in ("a5", "b2"):
        with pytest.raises(Busy, match="4 requests are waiting"):
            submit(name, Recorder())
    gate.open()
    for name, recorder in heard.items():
        recorder.wait().check_order()
        assert isinstance(recorder.error, Busy) == (name in ("a3", "a4"))
    assert heard["b0"].times[-1] < heard["a2"].times[-1]


def test_refused_requests(started: list[Engine]) -> None:
    engine = start(started, FakeModel(), context=32)
    for request, error, text in [
        (generation("a", [1] * 30, 3), ContextExceeded, "30 tokens and an answer of up to 3"),
        (generation("a", [], 3), RequestError, "at least one prompt token"),
        (generation("a", [1], 0), RequestError, "room for one more"),
        (generation("a", [64], 1), RequestError, "Token id 64 is outside the vocabulary of 64"),
        (generation("a", [1], 1, SamplingParams(logit_bias={-1: 2.0})), RequestError, "Token id -1"),
    ]:
        with pytest.raises(error, match=text):
            engine.submit(request, Recorder())
    heard = Recorder()
    engine.submit(generation("a", [1] * 29, 3), heard)
    assert heard.wait().reason is FinishReason.LENGTH


def test_a_request_id_is_unique_among_live_requests(started: list[Engine]) -> None:
    gate = Gate()
    engine = start(started, FakeModel(hook=gate))
    first, again = Recorder(), Recorder()
    engine.submit(generation("a", PROMPT, 2), first)
    with pytest.raises(RequestError, match="id a is being worked on"):
        engine.submit(generation("a", PROMPT, 2), again)
    gate.open()
    first.wait()
    engine.submit(generation("a", PROMPT, 2), again)
    assert again.wait().tokens == first.tokens


def test_a_fault_in_the_step_fails_its_requests_and_no_others(
    started: list[Engine], caplog: pytest.LogCaptureFixture
) -> None:
    def hook(batch: Batch) -> None:
        if 63 in batch.tokens:
            raise ZeroDivisionError("kernel broke")

    engine = start(started, FakeModel(hook=hook))
    bad, good = Recorder(), Recorder()
    with caplog.at_level(logging.ERROR):
        engine.submit(generation("bad", [1, 63], 5), bad)
        bad.wait().check_order()
    assert isinstance(bad.error, EngineFailure)
    assert "kernel broke" in caplog.text
    engine.check_integrity()
    engine.submit(generation("good", PROMPT, 5), good)
    assert good.wait().tokens == expected_greedy(PROMPT, 5)


def test_logits_that_are_no_numbers_fail_one_request_alone(started: list[Engine]) -> None:
    class Broken(FakeModel):
        def forward(self, batch, cache, tick=None):  # type: ignore[no-untyped-def]
            logits = super().forward(batch, cache, tick)
            for place, row in enumerate(batch.logit_rows):
                if batch.positions[row] > 15:
                    logits[place] = float("nan")
            return logits

    engine = start(started, Broken())
    bad, good = Recorder(), Recorder()
    engine.submit(generation("bad", PROMPT, 50), bad)
    engine.submit(generation("good", PROMPT[:3], 5), good)
    assert isinstance(bad.wait().error, EngineFailure)
    assert good.wait().tokens == expected_greedy(PROMPT[:3], 5)


def test_a_fault_while_admitting_loses_nobody(started: list[Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """The sequence is then in no queue, yet it gets its last word, and the engine goes on."""
    engine = start(started, FakeModel())

    def broken(scheduler: Scheduler, sequence: Sequence, found: list[int]) -> None:
        raise ZeroDivisionError("admission broke")

    bad, good = Recorder(), Recorder()
    with monkeypatch.context() as patch:
        patch.setattr(Scheduler, "_start", broken)
        engine.submit(generation("a", PROMPT, 5), bad)
        bad.wait().check_order()
        engine.abort("a")
    assert isinstance(bad.error, EngineFailure)
    engine.submit(generation("a", PROMPT, 5), good)
    assert good.wait().tokens == expected_greedy(PROMPT, 5)
    assert not engine.death.done()


@pytest.mark.parametrize("fault", ["remove", "add", "release"])
def test_a_dead_loop_tells_everybody(
    started: list[Engine], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    gate = Gate()
    engine = make_engine(FakeModel(hook=gate), max_sequences=2)
    engine.start()
    heard = [Recorder() for _ in range(4)]
    engine.submit(generation("0", PROMPT, 5), heard[0])
    assert gate.waiting.wait(10)

    def broken(*args: object) -> None:
        raise ZeroDivisionError(f"{fault} broke")

    # In these places a fault leaves the books wrong; `release` gives pages back, unknown to the pool.
    if fault == "release":
        monkeypatch.setattr(Scheduler, "schedule", broken)
        monkeypatch.setattr(BlockPool, "release", lambda pool, pages: None)
    else:
        monkeypatch.setattr(Scheduler, fault, broken)
    for i, recorder in enumerate(heard[1:], 1):
        engine.submit(generation(str(i), PROMPT, 5), recorder)
    gate.open()
    for recorder in heard:
        recorder.wait(10)
        assert isinstance(recorder.error, (EngineFailure, Unavailable)) or recorder.reason
    engine.death.result(10)
    for recorder in heard:
        recorder.check_order()
    assert any(isinstance(recorder.error, EngineFailure) for recorder in heard)
    with pytest.raises(Unavailable, match="failed and takes no more requests"):
        engine.submit(generation("late", PROMPT, 5), Recorder())
    assert engine.drain(1)
    engine.stop()


def test_a_lost_device_is_the_end(started: list[Engine]) -> None:
    """No later step could do better: the daemon has to be started anew."""

    def lost(batch: Batch) -> None:
        raise DeviceLost("cuda:0 gives no more results")

    engine = start(started, FakeModel(hook=lost))
    heard = Recorder()
    engine.submit(generation("a", PROMPT, 5), heard)
    assert isinstance(heard.wait().error, EngineFailure)
    engine.death.result(10)
    with pytest.raises(Unavailable, match="failed and takes no more requests"):
        engine.submit(generation("late", PROMPT, 5), Recorder())


def test_a_lost_file_is_the_end_and_named(started: list[Engine]) -> None:
    """Zeros came in its place: nothing is drawn from them, and whatever they broke is not blamed."""
    files = ["whole"]

    def check() -> None:
        if files != ["whole"]:
            raise FileLost("The model file x.gguf is gone.")

    for breaks in (False, True):
        files[:] = ["whole"]

        def lose(batch: Batch, breaks: bool = breaks) -> None:
            if len(batch.tokens) == 1:
                files.clear()
            if breaks and not files:
                raise ZeroDivisionError("no weights")

        engine = make_engine(FakeModel(hook=lose), check_file=check)
        started.append(engine)
        engine.start()
        heard = Recorder()
        engine.submit(generation("a", PROMPT, 5), heard)
        assert isinstance(heard.wait().error, FileLost)
        assert heard.tokens == expected_greedy(PROMPT, 1)
        assert engine.death.result(10) is heard.error


def test_an_abort_that_comes_too_late_does_not_hit_the_next_of_that_name(started: list[Engine]) -> None:
    engine = start(started, FakeModel())
    first, second = Recorder(), Recorder()

    def again(event: EngineEvent) -> None:
        if isinstance(event, Tokens):
            engine.abort("a")  # this token is the last: the request ends of itself in this step
        elif isinstance(event, Ended):
            engine.submit(generation("a", PROMPT, 5), second)

    first.action = again
    engine.submit(generation("a", PROMPT, 1), first)
    assert first.wait().reason is FinishReason.LENGTH
    assert second.wait().tokens == expected_greedy(PROMPT, 5)


@pytest.mark.parametrize("kind", [Prefilled, Tokens])
def test_a_listener_that_raises_hurts_only_its_own_request(started: list[Engine], kind: type) -> None:
    engine = start(started, FakeModel())

    def explode(event: EngineEvent) -> None:
        if isinstance(event, kind):
            raise ConnectionResetError("client is gone")

    bad, good = Recorder(explode), Recorder()
    engine.submit(generation("bad", PROMPT, 50), bad)
    engine.submit(generation("good", PROMPT, 20), good)
    assert good.wait().tokens == expected_greedy(PROMPT, 20)
    bad.wait().check_order()
    assert isinstance(bad.error, Unavailable)
    assert len(bad.tokens) <= 1


def test_a_listener_that_takes_no_more_ends_its_own_request(
    started: list[Engine], caplog: pytest.LogCaptureFixture
) -> None:
    engine = start(started, FakeModel())

    def full(event: EngineEvent) -> None:
        if isinstance(event, Tokens):
            raise Stalled("Too much waits to be read.")

    bad = Recorder(full)
    engine.submit(generation("bad", PROMPT, 50), bad)
    bad.wait().check_order()
    assert isinstance(bad.error, Stalled)
    assert len(bad.tokens) <= 1
    assert "Traceback" not in caplog.text


def test_a_file_that_is_lost_while_nobody_asks_is_noticed(
    started: list[Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ktd.engine.engine._IDLE_LOOK", 0.01)
    files = iter([None, None, FileLost("gone")])

    def check() -> None:
        if error := next(files):
            raise error

    engine = make_engine(FakeModel(), check_file=check)
    started.append(engine)
    engine.start()
    assert isinstance(engine.death.result(5), FileLost)


def test_preemption_changes_nothing_but_the_time(started: list[Engine]) -> None:
    model = FakeModel()
    # Two contexts of 64 tokens in pages for one and a half.
    engine = start(started, model, context=64, pages=24, page_size=4, max_sequences=4, chunk_tokens=8)
    prompts = [[i] * 12 for i in range(6)]
    heard = [Recorder() for _ in prompts]
    for i, prompt in enumerate(prompts):
        engine.submit(generation(str(i), prompt, 52), heard[i])
    for prompt, recorder in zip(prompts, heard, strict=True):
        recorder.wait().check_order()
        assert recorder.tokens == expected_greedy(prompt, 52)
    computed = sum(len(batch.tokens) for batch in model.steps)
    assert computed > 6 * 63, "nothing was ever preempted: the test proves nothing"


def test_drain_finishes_what_runs_and_refuses_what_comes(started: list[Engine]) -> None:
    gate = Gate()
    engine = start(started, FakeModel(hook=gate))
    heard = Recorder()
    engine.submit(generation("a", PROMPT, 5), heard)
    assert not engine.drain(0.05)
    with pytest.raises(Unavailable):
        engine.submit(generation("b", PROMPT, 5), Recorder())
    gate.open()
    assert engine.drain(30)
    assert heard.done.is_set()
    assert heard.tokens == expected_greedy(PROMPT, 5)


def test_stop_ends_everything_with_one_terminal_each(started: list[Engine]) -> None:
    engine = start(started, FakeModel(hook=lambda batch: sleep(0.01)), max_sequences=2)
    heard = [Recorder() for _ in range(5)]
    for i, recorder in enumerate(heard):
        engine.submit(generation(str(i), PROMPT, 100), recorder)
    until(lambda: bool(heard[0].tokens))
    engine.stop()
    for recorder in heard:
        recorder.wait(1).check_order()
        assert isinstance(recorder.error, Unavailable)
        assert "ask again in a moment" in str(recorder.error)
    with pytest.raises(Unavailable):
        engine.submit(generation("late", PROMPT, 5), Recorder())
    engine.stop()


def test_before_start_nothing_is_taken() -> None:
    engine = make_engine(FakeModel())
    with pytest.raises(Unavailable):
        engine.submit(generation("a", PROMPT, 5), Recorder())
    engine.stop()


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"context": 0}, "context is 0"),
        ({"context": 100, "pages": 1}, "takes 2 pages of 64"),
        ({"context": 100, "chunk_tokens": 4}, "chunk_tokens is 4"),
        ({"context": 100, "queue_limit": -1}, "queue_limit is -1"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(sizes: dict[str, int], text: str) -> None:
    with pytest.raises(SettingsError, match=text):
        EngineConfig(**sizes)  # type: ignore[arg-type]


def test_hundred_clients_with_interleaved_aborts(started: list[Engine]) -> None:
    engine = start(
        started, FakeModel(), context=64, pages=40, max_sequences=8, chunk_tokens=32, queue_limit=100
    )
    heard = [Recorder() for _ in range(100)]

    def client(i: int) -> None:
        engine.submit(generation(str(i), [i % 7] * (1 + i % 11) + [i % 64], 10 + i % 30), heard[i])
        if i % 3 == 0:
            sleep(0.001 * (i % 5))
            engine.abort(str(i))

    threads = [threading.Thread(target=client, args=(i,)) for i in range(100)]
    for thread in threads:
        thread.start()
    for i, recorder in enumerate(heard):
        recorder.wait().check_order()
        engine.check_integrity()
        expected = expected_greedy([i % 7] * (1 + i % 11) + [i % 64], 10 + i % 30)
        if recorder.error is None:
            assert recorder.tokens == expected
        else:
            assert i % 3 == 0
            assert recorder.tokens == expected[: len(recorder.tokens)]
    for thread in threads:
        thread.join()
