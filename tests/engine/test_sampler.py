"""What is drawn, against a plain float64 statement of the rules."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from time import perf_counter

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kit_engine import generation

from ktd.engine.sampler import Sampler, _candidates, _reached
from ktd.errors import EngineFailure
from ktd.types import SamplingParams

F32 = npt.NDArray[np.float32]
PLAIN = SamplingParams(temperature=1.0, top_p=1.0, seed=0)


def sampler(params: SamplingParams, prompt: tuple[int, ...] = (0,)) -> Sampler:
    return Sampler(generation("a", prompt, 8, params))


def logits_of(values: list[float]) -> F32:
    return np.array(values, np.float32)


def allowed_by_the_rules(logits: F32, p: SamplingParams) -> list[int]:
    """Likeliest first: top-k, then top-p of what is left, then min-p; plain sorting in float64."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    order = order[: p.top_k] if p.top_k else order
    scaled = np.exp((logits[order].astype(np.float64) - float(logits.max())) / p.temperature)
    count, mass = 0, 0.0
    while count < len(order) and (p.top_p == 1 or count == 0 or mass < p.top_p * scaled.sum()):
        mass += scaled[count]
        count += 1
    return [token for token, weight in zip(order[:count], scaled, strict=False) if weight >= p.min_p]


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


@settings(max_examples=300, deadline=None)
@given(
    values=st.lists(st.floats(-12, 12, width=32), min_size=1, max_size=60),
    temperature=st.sampled_from([0.3, 0.6, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 2, 5, 40, 1000]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.95, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
)
@example(values=[0.0, 0.0, 3.4349822986001755e-09], temperature=0.3, top_k=0, top_p=0.9, min_p=1.0)
def test_only_what_the_rules_allow_may_be_drawn(
    values: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = logits_of(values)
    expected = allowed_by_the_rules(logits, params)
    weights = np.exp((logits - logits.max()) / np.float32(temperature))
    found = _candidates(weights, top_k, top_p, min_p)
    if found is None:
        assert len(expected) == len(values)
        return
    ids = [int(i) for i in found]
    assert ids == sorted(set(ids))
    # A token whose cumulated mass meets top_p to the last bit may fall on either side, as may those whose
    # weight meets min_p: an exponent of up to 24 / 0.3 is rounded twice, by 2^-25 of it each, which is the
    # weight's relative error. Values that differ less than that are in either order.
    error = 2 * 80 * 2.0**-25 + 2 * 2.0**-24
    least = allowed_by_the_rules(logits, replace(params, min_p=min_p * (1 + error)))
    most = allowed_by_the_rules(logits, replace(params, min_p=min_p * (1 - error)))
    assert max(len(least) - 1, 1) <= len(ids) <= len(most) + 1
    common = min(len(ids), len(expected))
    best = sorted(weights[ids], reverse=True)[:common]
    assert np.allclose(best, sorted(weights[expected], reverse=True)[:common], rtol=1e-5)


def test_a_flat_vocabulary_keeps_its_share_without_sorting() -> None:
    logits = np.random.default_rng(3).standard_normal(50_000).astype(np.float32)
    weights = np.exp(logits - logits.max())
    found = _candidates(weights, 0, 0.95, 0.0)
    assert found is not None
    expected = allowed_by_the_rules(logits, SamplingParams(temperature=1.0, top_p=0.95))
    assert abs(len(found) - len(expected)) <= 1
    assert len(set(map(int, found)) ^ set(expected)) <= 2


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


def test_a_row_of_r1_takes_few_milliseconds() -> None:
    rows = 3 * np.random.default_rng(0).standard_normal((20, 129280)).astype(np.float32)
    one = sampler(SamplingParams(seed=0))
    times = []
    for row in rows:
        begin = perf_counter()
        one.draw(row)
        times.append(perf_counter() - begin)
    assert sorted(times)[10] < 0.02  # measured 0.0005 to 0.002 on one core


@pytest.mark.parametrize("size", [1, 2, 511, 512, 513, 5000])
def test_a_place_is_reached_where_the_running_sum_passes_the_fraction(size: int) -> None:
    rng = np.random.default_rng(size)
    weights = rng.random(size).astype(np.float32)
    weights[rng.random(size) < 0.5] = 0.0
    weights[size // 2] = 1.0
    exact = np.cumsum(weights, dtype=np.longdouble)
    for fraction in (0.0, 1.0 - 2.0**-53, *rng.random(200)):
        place = _reached(weights, fraction)
        assert weights[place] > 0
        slack = 1e-13 * exact[-1]
        assert exact[place] >= fraction * exact[-1] - slack
        assert exact[place] - weights[place] <= fraction * exact[-1] + slack
