"""A request's constraint in the step loop: kept, the end of the request, freed with it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from kit_engine import FakeModel, Recorder, expected_greedy, generation, make_engine, until

from ktd.engine import Engine
from ktd.errors import EngineFailure
from ktd.types import FinishReason, Prefilled, SamplingParams

PROMPT = [5, 9, 2, 33, 7, 1, 60, 12, 40]


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = make_engine(FakeModel())
    made.start()
    yield made
    made.stop()
    made.check_integrity()


class Script:
    """A constraint that lets one token follow the other; then the request `ends`, or nothing may follow."""

    def __init__(self, tokens: list[int], *, ends: bool = True) -> None:
        self.tokens, self.ends = tokens, ends

    def mask(self, logits: npt.NDArray[np.float32]) -> None:
        logits[[n for n in range(len(logits)) if n not in self.tokens[:1]]] = -np.inf
        if not self.tokens:
            raise EngineFailure("nothing may follow")

    def accept(self, token: int) -> None:
        assert token == self.tokens.pop(0)

    @property
    def complete(self) -> bool:
        return self.ends and not self.tokens


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_constraint_is_kept_and_ends_the_request(engine: Engine, temperature: float) -> None:
    sampling = SamplingParams(temperature=temperature, repetition_penalty=1.3, logit_bias={4: 100.0})
    heard = {}
    for most in (3, 20):  # the end counts even where max_tokens is reached with it
        heard[most] = Recorder()
        request = generation(f"{most}", PROMPT, most, sampling, stop=[63])
        engine.submit(replace(request, constraint=Script([7, 50, 7])), heard[most])
    for each in heard.values():
        each.wait().check_order()
        assert (each.tokens, each.reason) == ([7, 50, 7], FinishReason.STOP)


def test_a_dead_end_ends_one_request_in_one_sentence(engine: Engine) -> None:
    stuck, other = Recorder(), Recorder()
    engine.submit(replace(generation("a", PROMPT, 20), constraint=Script([7, 9], ends=False)), stuck)
    engine.submit(generation("b", PROMPT, 20), other)
    stuck.wait().check_order()
    assert (stuck.tokens, str(stuck.error)) == ([7, 9], "nothing may follow")
    assert other.wait().tokens == expected_greedy(PROMPT, 20)


@pytest.mark.parametrize("aborts", [True, False])
def test_a_request_that_ended_keeps_no_constraint(engine: Engine, aborts: bool) -> None:
    heard = Recorder(lambda event: engine.abort("a") if aborts and isinstance(event, Prefilled) else None)
    constraint = Script([7] * 9)
    left = weakref.ref(constraint)
    engine.submit(replace(generation("a", PROMPT, 9), constraint=constraint), heard)
    del constraint
    heard.wait()
    assert (heard.error is not None) is aborts
    until(lambda: left() is None)
