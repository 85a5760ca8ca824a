"""What is drawn for requests: seeds, penalties, biases, and whose fault is whose. Of the draw itself see
tests/kernels/test_ops_sample.py."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from kit_engine import generation

from ktd.engine.sampler import Sampler, draw_tokens
from ktd.errors import EngineFailure
from ktd.types import SamplingParams
from ktd_kernels import Cpu

F32 = npt.NDArray[np.float32]
PLAIN = SamplingParams(temperature=1.0, top_p=1.0, seed=0)


CPU = Cpu(threads=1)


class Drawn:
    """A sampler alone in its step."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def draw(self, logits: F32) -> int:
        (token,) = draw_tokens(CPU, logits[None], [self.sampler])
        if isinstance(token, Exception):
            raise token
        return token


def sampler(params: SamplingParams, prompt: tuple[int, ...] = (0,)) -> Drawn:
    return Drawn(Sampler(generation("a", prompt, 8, params)))


def logits_of(values: list[float]) -> F32:
    return np.array(values, np.float32)


def test_greedy_takes_the_largest_and_of_equals_the_lowest() -> None:
    greedy = replace(PLAIN, temperature=0.0)
    assert sampler(greedy).draw(logits_of([1, 3, 2, 3])) == 1


def test_draws_follow_the_probabilities() -> None:
    probabilities = np.array([0.5, 0.25, 0.15, 0.1])
    drawn = sampler(PLAIN)
    count = 20000
    counts = Counter(drawn.draw(np.log(probabilities).astype(np.float32)) for _ in range(count))
    for token, p in enumerate(probabilities):
        assert abs(counts[token] - count * p) < 5 * np.sqrt(count * p * (1 - p))


def test_temperature_sharpens() -> None:
    drawn = sampler(replace(PLAIN, temperature=0.5))
    counts = Counter(drawn.draw(logits_of([0.0, 1.0])) for _ in range(10000))
    odds = np.exp(2.0)
    assert abs(counts[1] / 10000 - odds / (1 + odds)) < 0.02


def test_a_temperature_near_zero_is_greedy_and_silent() -> None:
    assert sampler(replace(PLAIN, temperature=1e-30)).draw(logits_of([-3e38, 5, 4.9])) == 1


def test_same_seed_same_draws_and_another_seed_others() -> None:
    rows = np.random.default_rng(1).standard_normal((50, 1000)).astype(np.float32)

    def text(seed: int | None) -> list[int]:
        one = sampler(replace(PLAIN, seed=seed))
        return [one.draw(row.copy()) for row in rows]

    assert text(7) == text(7)
    assert text(7) != text(8)
    assert text(None) != text(None)
    assert text(-1) == text(2**64 - 1)


def test_repetition_penalty_counts_the_prompt_presence_and_frequency_do_not() -> None:
    greedy = replace(PLAIN, temperature=0.0)
    row = [2.0, 1.9, -1.0]
    assert sampler(replace(greedy, repetition_penalty=1.5), (0,)).draw(logits_of(row)) == 1
    assert sampler(replace(greedy, presence_penalty=2.0), (0,)).draw(logits_of(row)) == 0
    # A negative logit is made more negative, not less.
    assert sampler(replace(greedy, repetition_penalty=3.0), (0,)).draw(logits_of([-1.0, -2.0])) == 1

    presence = sampler(replace(greedy, presence_penalty=0.5))
    assert [presence.draw(logits_of(row)) for _ in range(4)] == [0, 1, 0, 0]
    frequency = sampler(replace(greedy, frequency_penalty=0.5))
    assert [frequency.draw(logits_of(row)) for _ in range(4)] == [0, 1, 0, 1]


def test_logit_bias_bans_and_forces() -> None:
    banned = sampler(replace(PLAIN, temperature=0.0, logit_bias={1: -100.0}))
    assert banned.draw(logits_of([0.0, 50.0, 1.0])) == 2
    forced = sampler(replace(PLAIN, logit_bias={2: 100.0}))
    assert {forced.draw(logits_of([0.0, 5.0, 1.0])) for _ in range(20)} == {2}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_no_numbers_are_refused(value: float) -> None:
    with pytest.raises(EngineFailure):
        sampler(PLAIN).draw(np.full(5, value, np.float32))


class Stuck:
    """A constraint that allows nothing, or is surprised by what it allowed."""

    complete = False

    def __init__(self, *, surprised: bool) -> None:
        self._surprised = surprised

    def mask(self, logits: F32) -> None:
        if not self._surprised:
            raise EngineFailure("nothing may follow")

    def accept(self, token: int) -> None:
        raise EngineFailure("that was not allowed")


@pytest.mark.parametrize("surprised", [False, True])
def test_a_fault_of_one_row_is_its_own(surprised: bool) -> None:
    """Behind it the others draw what they draw without it."""
    rows = 3 * np.random.default_rng(2).standard_normal((4, 500)).astype(np.float32)
    rows[3] = np.nan

    def draws(among: list[int]) -> list[int | Exception]:
        requests = [generation("a", (0,), 8, replace(PLAIN, seed=number)) for number in range(4)]
        requests[1] = replace(requests[1], constraint=Stuck(surprised=surprised))
        return draw_tokens(CPU, rows[among], [Sampler(requests[number]) for number in among])

    first, stuck, third, broken = draws([0, 1, 2, 3])
    assert str(stuck) == ("that was not allowed" if surprised else "nothing may follow")
    assert isinstance(broken, EngineFailure)
    assert [first, third] == draws([0, 2])
    assert draws([1])[0].args == stuck.args  # type: ignore[union-attr]
