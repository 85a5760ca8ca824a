"""Drawn tokens and log probabilities against the reference, on every instruction set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kit_kernels import F32, normal
from numpy.typing import NDArray

from ktd_kernels import Cpu, reference

U = 2.0**-24
R1 = 129_280


class Rule(NamedTuple):
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


def draw(cpu: Cpu, logits: F32, rule: Rule, fractions: NDArray[np.float64]) -> NDArray[np.int32]:
    """What one row, logits [vocab], gives for each of the random numbers."""
    rules = np.column_stack([np.tile(rule, (len(fractions), 1)), fractions])
    tokens = np.full(len(fractions), -2, np.int32)
    cpu.draw(logits[None], np.zeros(len(fractions), np.int32), rules, tokens)
    return tokens


def boundaries(cpu: Cpu, logits: F32, rule: Rule, tokens: NDArray[np.int64]) -> NDArray[np.float64]:
    """The least random number that draws a token behind each of `tokens`, to the last bit; 1 where none
    does."""
    low, high = np.zeros(len(tokens)), np.ones(len(tokens))
    behind = draw(cpu, logits, rule, low) > tokens
    high[behind] = 0.0
    while True:
        middle = (low + high) / 2
        open_ = (middle > low) & (middle < high)
        if not open_.any():
            return high
        behind = draw(cpu, logits, rule, np.where(open_, middle, 0.0)) > tokens
        high = np.where(open_ & behind, middle, high)
        low = np.where(open_ & ~behind, middle, low)


def weight_error(logits: F32, temperature: float) -> NDArray[np.float64]:
    """Relative error of each token's weight: of the exponent, which is rounded three times, and of its
    power."""
    exponents = (float(logits.max()) - logits.astype(np.float64)) / temperature
    error: NDArray[np.float64] = 3 * U * exponents + 2e-7
    return error


def near(rule: Rule, error: float) -> Iterator[Rule]:
    """Rules one of which may be what is met: a sum that meets top_p, or a weight that meets min_p, but for
    the error of weights falls on either side."""
    for p in {rule.top_p, rule.top_p * (1 + 2 * error), rule.top_p * (1 - 2 * error)}:
        for least in {rule.min_p, min(rule.min_p * (1 + error), 1.0), rule.min_p * (1 - error)}:
            yield rule._replace(top_p=p if rule.top_p < 1 else 1.0, min_p=least)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    # Multiples of 1/64: many equals, and none whose weights are equal or swapped for their rounding.
    values=st.lists(st.integers(-768, 768), min_size=1, max_size=40),
    temperature=st.sampled_from([0.3, 0.6, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 2, 5, 40, 1000]),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 0.95, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
)
def test_probabilities_are_those_of_the_rules(
    isa: str, values: list[int], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits, rule = np.array(values, np.float32) / 64, Rule(temperature, top_k, top_p, min_p)
    ends = boundaries(Cpu(1, isa), logits, rule, np.arange(len(logits)))
    assert ends[-1] == 1.0
    found = np.diff(ends, prepend=0.0)
    error = float(weight_error(logits, temperature).max())
    candidates = [reference.draw_probabilities(logits, *each) for each in near(rule, error)]
    step = 2.0**-52  # what random numbers near 1 resolve, twice
    assert any(
        ((found > 0) | (p <= step)).all()
        and ((found == 0) | (p > 0)).all()
        and (np.abs(found - p) <= 2 * error * p + step).all()
        for p in candidates
    )


def peaked(seed: int) -> F32:
    """As a trained model's: few tokens stand out."""
    rng = np.random.default_rng(seed)
    logits = 2 * normal(seed, R1)
    logits[rng.integers(0, R1, 40)] += 12 + 3 * normal(seed + 1, 40)
    return logits


RULES = [
    Rule(),
    Rule(0.6, 0, 0.95),
    Rule(1.0, 40),
    Rule(1.0, 40, 0.9, 0.02),
    Rule(1.5, 1000, 0.99),
    Rule(1.0, 0, 1.0, 0.001),
    Rule(0.8, 0, 0.9999, 0.0001),
    Rule(1.0, R1 + 1, 0.5),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(
    "logits", [normal(0, R1), peaked(0), normal(1, 5001)], ids=["flat", "peaked", "5001"]
)
def test_a_vocabulary_of_the_size_of_r1(cpu: Cpu, logits: F32, rule: Rule) -> None:
    fractions = np.random.default_rng(7).random(64)
    tokens = draw(cpu, logits, rule, fractions)
    error = weight_error(logits, rule.temperature)
    lows, highs = [], []
    for each in near(
        rule, float(np.sum(error * reference.draw_probabilities(logits, *rule[:1], 0, 1.0, 0.0)))
    ):
        p = reference.draw_probabilities(logits, *each)
        sums, slack = np.cumsum(p), 2 * float(np.sum(p * error))
        lows.append(np.searchsorted(sums, (fractions - slack) * sums[-1], side="right"))
        highs.append(np.searchsorted(sums, (fractions + slack) * sums[-1], side="right"))
    low, high = np.min(lows, axis=0), np.max(highs, axis=0)
    assert ((low <= tokens) & (tokens <= high)).all()
    assert (low == high).mean() > 0.5  # else this would show little


@pytest.mark.parametrize("size", [1, 15, 511, 512, 513, 9000, R1])
def test_greedy_takes_the_largest_and_of_equals_the_lowest(cpu: Cpu, size: int) -> None:
    logits = normal(size, 5, size)
    logits[1] = 0.0
    logits[2, size // 2 :] = 9.0
    logits[3, -1] = 9.0
    logits[4, : size // 3] = -np.inf
    rules = np.tile([0.0, 3, 0.5, 0.5, 0.9], (5, 1))
    tokens = np.full(5, -2, np.int32)
    cpu.draw(logits, np.arange(5, dtype=np.int32), rules, tokens)
    np.testing.assert_array_equal(tokens, logits.argmax(axis=1))


@pytest.mark.parametrize("size", [1000, 20_000])
def test_of_equals_the_lowest_ids_are_kept(cpu: Cpu, size: int) -> None:
    logits = np.zeros(size, np.float32)
    logits[-1] = 1.0
    last = np.array([1.0 - 2.0**-53])
    assert draw(cpu, logits, Rule(top_k=3), last * 0.5).tolist() == [size - 1]
    assert boundaries(cpu, logits, Rule(top_k=3), np.array([-1, 0, 1, 2])).tolist()[0] == 0.0
    assert draw(cpu, logits, Rule(top_k=3), np.array([0.0, 0.3])).tolist() == [0, 1]
    logits[-1] = 0.0
    half = draw(cpu, logits, Rule(top_p=0.5), np.array([0.0, 1.0 - 2.0**-53]))
    assert half.tolist() == [0, size // 2 - 1]
    assert draw(cpu, logits, Rule(top_k=7, top_p=0.5), last).tolist() == [3]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_last_random_number_draws_what_is_allowed(cpu: Cpu, rule: Rule) -> None:
    for logits in (peaked(3), normal(3, 700)):
        logits[-300:] = -np.inf
        logits[:10] = -200.0  # a weight of 0
        first, last = draw(cpu, logits, rule, np.array([0.0, 1.0 - 2.0**-53]))
        weights = np.exp((logits - logits.max()) / rule.temperature)
        assert 10 <= first <= last < len(logits) - 300
        assert weights[first] >= rule.min_p
        assert weights[last] >= rule.min_p
        if rule.top_k:
            assert (logits > logits[last]).sum() < rule.top_k


@pytest.mark.parametrize("temperature", [1e-30, 1e-4, 1e20])
def test_extreme_temperatures(cpu: Cpu, temperature: float) -> None:
    logits = np.array([-3e38, 5, 4.9, 5, 4.0], np.float32)
    tokens = draw(cpu, logits, Rule(temperature), np.array([0.1, 0.45, 0.55, 0.9]))
    assert tokens.tolist() == ([1, 2, 3, 4] if temperature > 1 else [1, 1, 3, 3])


BROKEN: list[tuple[str, Callable[[F32], Any]]] = [
    ("all NaN", lambda row: row.fill(np.nan)),
    ("all inf", lambda row: row.fill(np.inf)),
    ("all -inf", lambda row: row.fill(-np.inf)),
    ("one inf", lambda row: row.put(77, np.inf)),
    ("first NaN", lambda row: row.put(0, np.nan)),
    ("one NaN", lambda row: row.put(600, np.nan)),
    ("last NaN", lambda row: row.put(-1, np.nan)),
]


@pytest.mark.parametrize("spoil", [each for _, each in BROKEN], ids=[name for name, _ in BROKEN])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_numbers_has_no_token_and_harms_no_other(
    cpu: Cpu, spoil: Callable[[F32], Any], temperature: float
) -> None:
    logits = normal(0, 3, 1281)
    rules = np.tile([temperature, 0, 0.9, 0.0, 0.5], (3, 1))
    before, after = np.empty(3, np.int32), np.empty(3, np.int32)
    cpu.draw(logits, np.arange(3, dtype=np.int32), rules, before)
    spoil(logits[1])
    cpu.draw(logits, np.arange(3, dtype=np.int32), rules, after)
    assert after.tolist() == [before[0], -1, before[2]]
    totals, ids = np.empty(3), np.full((3, 4), -1, np.int32)
    cpu.score(logits, np.arange(3, dtype=np.int32), totals, ids)
    assert np.isnan(totals).tolist() == [False, True, False]
    assert ((ids >= 0) & (ids < 1281)).all()


@pytest.mark.parametrize("rule", RULES[:5], ids=str)
def test_nothing_depends_on_threads_or_company(isa: str, rule: Rule) -> None:
    """To the last bit: the boundaries between tokens show the sums."""
    logits, behind = normal(5, 20_000), np.array([100, 5000, 12_345, 19_000])
    alone, many = Cpu(1, isa), Cpu(5, isa)
    ends = boundaries(alone, logits, rule, behind)
    np.testing.assert_array_equal(boundaries(many, logits, rule, behind), ends)
    rows = np.stack([normal(6, 20_000), logits, normal(7, 20_000)])
    numbers = np.tile(np.array([2, 1, 0, 1], np.int32), 4)
    rules = np.tile([*rule, 0.0], (16, 1))
    rules[1::4, 4], rules[3::4, 4] = np.where(ends < 1, ends, 0.0), np.nextafter(ends, 0.0)
    tokens = np.empty(16, np.int32)
    many.draw(rows, numbers, rules, tokens)
    assert ((tokens[1::4] > behind) | (ends == 1)).all()
    assert ((tokens[3::4] <= behind) | (ends == 0)).all()


def score(cpu: Cpu, logits: F32, count: int) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    totals, ids = np.full(len(logits), np.nan), np.full((len(logits), count), -1, np.int32)
    cpu.score(logits, np.arange(len(logits), dtype=np.int32), totals, ids)
    return totals, ids


@pytest.mark.parametrize("size", [7, 64, 1281, R1])
def test_log_probabilities(cpu: Cpu, size: int) -> None:
    logits = 6 * normal(size, 4, size)
    logits[:, 1::5] = logits[:, :1]  # many equals
    logits[3] = 1.0
    exact = logits.astype(np.float64)
    top = exact.max(axis=1, keepdims=True)
    weights = np.exp(exact - top)
    want = top[:, 0] + np.log(weights.sum(axis=1))
    bound = ((3 * U * (top - exact) + 2e-7) * weights).sum(axis=1) / weights.sum(axis=1) + 1e-13
    for count in (0, 1, min(20, size), min(300, size)):
        totals, ids = score(cpu, logits, count)
        assert (np.abs(totals - want) <= bound).all()
        np.testing.assert_array_equal(ids, np.argsort(-logits, axis=1, kind="stable")[:, :count])


def test_log_probabilities_depend_on_nothing_else(isa: str) -> None:
    logits = 4 * normal(1, 9, 20_001)
    totals, ids = score(Cpu(4, isa), logits, 20)
    alone = Cpu(1, isa)
    for row in range(9):
        own_totals, own_ids = score(alone, logits[row : row + 1], 20)
        assert own_totals[0] == totals[row]
        np.testing.assert_array_equal(own_ids[0], ids[row])


def test_rows_may_have_gaps_and_come_in_any_order(cpu: Cpu) -> None:
    wide = normal(2, 6, 1300)
    rows, tokens = np.array([5, 0, 3], np.int32), np.empty(3, np.int32)
    cpu.draw(wide[:, :1281], rows, np.tile([0.0, 0, 1, 0, 0], (3, 1)), tokens)
    np.testing.assert_array_equal(tokens, wide[rows, :1281].argmax(axis=1))
    totals, ids = np.empty(3), np.empty((3, 1), np.int32)
    cpu.score(wide[:, :1281], rows, totals, ids)
    np.testing.assert_array_equal(ids[:, 0], tokens)
    none = np.empty(0, np.int32)
    cpu.draw(wide, none, np.empty((0, 5)), none)
    cpu.score(wide, none, np.empty(0), np.empty((0, 3), np.int32))


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ((-1, 0, 1, 0, 0), "temperature in rules"),
        ((np.nan, 0, 1, 0, 0), "temperature in rules"),
        ((np.inf, 0, 1, 0, 0), "temperature in rules"),
        ((1, -1, 1, 0, 0), "top_k in rules"),
        ((1, 0, 0, 0, 0), "top_p in rules"),
        ((1, 0, 1.1, 0, 0), "top_p in rules"),
        ((1, 0, 1, 1.1, 0), "min_p in rules"),
        ((1, 0, 1, 0, 1), "fraction in rules"),
        ((1, 0, 1, 0, -0.1), "fraction in rules"),
    ],
)
def test_rules_out_of_range_are_refused(rule: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cpu(1).draw(
            np.zeros((1, 9), np.float32),
            np.zeros(1, np.int32),
            np.array([rule], float),
            np.zeros(1, np.int32),
        )


def test_wrong_arrays_are_refused() -> None:
    cpu, logits, tokens = Cpu(1), np.zeros((2, 9), np.float32), np.zeros(1, np.int32)
    with pytest.raises(ValueError, match=r"rows\[0\] is 2"):
        cpu.draw(logits, np.array([2], np.int32), np.zeros((1, 5)), tokens)
    with pytest.raises(ValueError, match="at least one column"):
        cpu.draw(logits[:, :0], np.array([0], np.int32), np.ones((1, 5)) / 2, tokens)
    with pytest.raises(ValueError, match="rules has shape"):
        cpu.draw(logits, np.array([0], np.int32), np.zeros((1, 4)), tokens)
    with pytest.raises(ValueError, match="room for 10 tokens a row"):
        cpu.score(logits, np.array([0], np.int32), np.zeros(1), np.zeros((1, 10), np.int32))
