"""The policy alone: invariants under any sequence of arrivals, aborts and steps; fairness; preemption."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from kit_engine import generation

from ktd.cache import BlockPool
from ktd.sched import Scheduler, Sequence, Work
from ktd.sched.budget import fair_shares
from ktd.types import Priority


def make(pages: int = 32, page_size: int = 4, max_sequences: int = 4, step_tokens: int = 16) -> Scheduler:
    return Scheduler(
        BlockPool(pages), page_size=page_size, max_sequences=max_sequences, step_tokens=step_tokens
    )


def sequence(name: str, prompt: list[int], limit: int = 100, low: bool = False) -> Sequence:
    priority = Priority.LOW if low else Priority.NORMAL
    return Sequence(generation(name, prompt, limit, priority=priority))


def step(scheduler: Scheduler) -> list[Work]:
    """One step in which every sequence that draws draws token 1."""
    work = scheduler.schedule()
    scheduler.commit(work)
    for item in work:
        if item.draws:
            item.sequence.tokens.append(1)
    return work


def counts(work: list[Work]) -> dict[str, int]:
    return {item.sequence.request.request_id: item.count for item in work}


@given(st.lists(st.integers(0, 50), max_size=12), st.integers(0, 100))
def test_fair_shares_spend_the_budget_and_favour_nobody(wanted: list[int], budget: int) -> None:
    shares = fair_shares(wanted, budget)
    assert sum(shares) == min(budget, sum(wanted))
    assert all(0 <= share <= want for share, want in zip(shares, wanted, strict=True))
    short = [share for share, want in zip(shares, wanted, strict=True) if share < want]
    # Whoever did not get all has at most one token less than anybody got.
    assert not short or min(short) >= max(shares) - 1


def test_decode_rows_come_first_and_prompts_share_what_is_left() -> None:
    scheduler = make(max_sequences=3)
    scheduler.add(sequence("a", [1] * 4))
    assert counts(step(scheduler)) == {"a": 4}
    scheduler.add(sequence("long", [2] * 60))
    scheduler.add(sequence("short", [3] * 5))
    assert counts(step(scheduler)) == {"a": 1, "long": 10, "short": 5}
    assert counts(step(scheduler)) == {"a": 1, "long": 14, "short": 1}


def test_low_prompts_get_what_normal_ones_leave() -> None:
    scheduler = make()
    scheduler.add(sequence("low", [1] * 40, low=True))
    assert counts(step(scheduler)) == {"low": 16}
    scheduler.add(sequence("normal", [2] * 20))
    assert counts(step(scheduler)) == {"normal": 16}
    assert counts(step(scheduler)) == {"normal": 4, "low": 12}


def test_low_ones_are_preempted_before_normal_ones() -> None:
    scheduler = make(pages=8, page_size=4, max_sequences=2)
    scheduler.add(sequence("low", [1] * 8, low=True))
    step(scheduler)
    scheduler.add(sequence("normal", [2] * 12))
    step(scheduler)
    assert len(scheduler.running) == 2
    while not scheduler.waiting:
        step(scheduler)
    assert [s.request.request_id for s in scheduler.running] == ["normal"]
    assert [s.request.request_id for s in scheduler.waiting] == ["low"]


def test_nobody_overtakes_a_request_that_waits_for_pages() -> None:
    scheduler = make(pages=10, page_size=4)
    scheduler.add(sequence("a", [1] * 16))
    step(scheduler)
    scheduler.add(sequence("big", [2] * 30))
    scheduler.add(sequence("small", [3]))
    scheduler.add(sequence("small and low", [3], low=True))
    step(scheduler)
    assert [s.request.request_id for s in scheduler.waiting] == ["big", "small", "small and low"]


def test_a_step_must_have_room_for_every_sequence() -> None:
    with pytest.raises(ValueError, match="3 tokens cannot serve 4"):
        make(step_tokens=3)


class AnyHistory(RuleBasedStateMachine):
    """Random arrivals, ends, faults and steps on few pages; nothing leaks, nobody is lost or starved."""

    @initialize(
        pages=st.integers(8, 20),
        page_size=st.integers(1, 5),
        max_sequences=st.integers(1, 5),
        step_tokens=st.integers(5, 24),
    )
    def begin(self, pages: int, page_size: int, max_sequences: int, step_tokens: int) -> None:
        self.pages, self.page_size, self.step_tokens = pages, page_size, step_tokens
        self.max_sequences = max_sequences
        self.scheduler = make(pages, page_size, max_sequences, step_tokens)
        self.live: list[Sequence] = []
        self.number = 0

    @rule(data=st.data(), low=st.booleans(), alphabet=st.integers(1, 2))
    def add(self, data: st.DataObject, low: bool, alphabet: int) -> None:
        context = self.pages * self.page_size
        length = data.draw(st.integers(1, max(context - 1, 1)))
        limit = data.draw(st.integers(1, context - length)) if context > length else 0
        if limit == 0:
            return
        self.number += 1
        prompt = [i % alphabet for i in range(length)]
        self.live.append(sequence(str(self.number), prompt, limit, low))
        self.scheduler.add(self.live[-1])

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        victim = data.draw(st.sampled_from(self.live))
        self.live.remove(victim)
        self.scheduler.remove(victim)

    @rule()
    def failed_step(self) -> None:
        """Scheduled, never committed: the engine removes its sequences."""
        for item in self.scheduler.schedule():
            self.live.remove(item.sequence)
            self.scheduler.remove(item.sequence)

    @rule()
    def step(self) -> None:
        work = self.scheduler.schedule()
        assert bool(work) == bool(self.live)
        assert sum(item.count for item in work) <= self.step_tokens
        assert len({item.sequence for item in work}) == len(work)
        for item in work:
            sequence = item.sequence
            assert item.start == sequence.computed
            assert len(sequence.pages) * self.page_size >= item.start + item.count
            assert sequence in self.scheduler.running
        self.scheduler.commit(work)
        for item in work:
            if item.draws:
                item.sequence.tokens.append(1)
                if item.sequence.drawn == item.sequence.request.max_tokens:
                    self.live.remove(item.sequence)
                    self.scheduler.remove(item.sequence)

    @invariant()
    def nothing_leaks(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        assert len(self.scheduler.running) <= self.max_sequences
        known = [*self.scheduler.running, *self.scheduler.waiting]
        assert sorted(map(id, known)) == sorted(map(id, self.live))

    def teardown(self) -> None:
        """Whatever is left can be finished."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(20000):
            if not self.live:
                break
            self.step()
            self.nothing_leaks()
        assert not self.live, "someone starves"
        assert self.scheduler.idle


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
