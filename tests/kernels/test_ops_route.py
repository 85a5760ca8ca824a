"""Expert selection against the reference, on every instruction set."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ktd_kernels import Cpu, reference

U = 2.0**-24

V3 = dict(gating="sigmoid", groups=8, groups_used=4, group_score="top2", used=8, normalise=True, scale=2.5)
V2 = dict(gating="softmax", groups=8, groups_used=3, group_score="max", used=6, normalise=False, scale=16.0)
V2_LITE = dict(
    gating="softmax", groups=1, groups_used=1, group_score="max", used=6, normalise=False, scale=1.0
)
KIMI = dict(
    gating="sigmoid", groups=1, groups_used=1, group_score="top2", used=8, normalise=True, scale=2.827
)
TINY = dict(gating="sigmoid", groups=4, groups_used=4, group_score="top2", used=16, normalise=True, scale=1.0)


def call(
    cpu: Cpu, logits: np.ndarray, bias: np.ndarray | None, rule: dict[str, Any]
) -> tuple[np.ndarray, ...]:
    ids = np.full((len(logits), rule["used"]), -1, np.int32)
    weights = np.full((len(logits), rule["used"]), np.nan, np.float32)
    cpu.route(logits, bias, **rule, ids_out=ids, weights_out=weights)
    return ids, weights


@pytest.mark.parametrize(
    ("rule", "experts", "with_bias"),
    [(V3, 256, True), (V2, 160, False), (V2_LITE, 64, False), (KIMI, 384, True), (TINY, 16, True)],
    ids=["v3", "v2", "v2-lite", "kimi", "all-used"],
)
def test_route_matches_reference(cpu: Cpu, rule: dict[str, Any], experts: int, with_bias: bool) -> None:
    rng = np.random.default_rng(experts)
    logits = rng.standard_normal((200, experts), np.float32) * 2
    bias = rng.standard_normal(experts, np.float32) * np.float32(0.1) if with_bias else None
    ids, weights = call(cpu, logits, bias, rule)
    want_ids, want_weights = reference.route(logits, bias, **rule)
    np.testing.assert_array_equal(ids, want_ids)
    # exp within 2 units, a sum over all experts (softmax) or the chosen ones, and three more operations.
    terms = experts if rule["gating"] == "softmax" else rule["used"]
    np.testing.assert_allclose(weights, want_weights, rtol=(terms + 10) * U)


def test_ties_go_to_the_lowest_index(cpu: Cpu) -> None:
    logits = np.zeros((3, 256), np.float32)
    ids, weights = call(cpu, logits, None, V3)
    np.testing.assert_array_equal(ids, np.tile(np.arange(8), (3, 1)))
    np.testing.assert_allclose(weights, 2.5 / 8, rtol=4 * U)
    logits[:, 255] = 1.0
    ids, _ = call(cpu, logits, None, V3)
    np.testing.assert_array_equal(ids[0], [255, 0, 1, 2, 3, 4, 5, 6])


def test_bias_chooses_but_does_not_weigh(cpu: Cpu) -> None:
    logits = np.zeros((1, 384), np.float32)
    bias = np.zeros(384, np.float32)
    bias[[300, 7]] = 5.0, 3.0
    ids, weights = call(cpu, logits, bias, KIMI)
    np.testing.assert_array_equal(ids[0], [300, 7, 0, 1, 2, 3, 4, 5])
    np.testing.assert_allclose(weights, 2.827 / 8, rtol=4 * U)


def test_group_rules_differ(cpu: Cpu) -> None:
    """One group holds the single best expert, the other the best pair."""
    logits = np.full((1, 8), -9.0, np.float32)
    logits[0, 0], logits[0, 4:6] = 2.0, 1.5
    rule = dict(V3, groups=2, groups_used=1, used=2)
    assert call(cpu, logits, None, rule)[0].tolist() == [[4, 5]]
    assert call(cpu, logits, None, dict(rule, group_score="max"))[0].tolist() == [[0, 1]]


def test_extreme_logits_stay_finite(cpu: Cpu) -> None:
    logits = np.linspace(-3e4, 3e4, 64, dtype=np.float32)[None]
    for rule in (V2_LITE, dict(KIMI, used=6)):
        ids, weights = call(cpu, logits, None, rule)
        assert np.isfinite(weights).all()
        assert ids[0, 0] in (63, 32)  # the largest, or the first of those whose sigmoid rounds to 1
    _, weights = call(cpu, np.full((1, 384), -200.0, np.float32), None, KIMI)
    assert np.isfinite(weights).all()


def test_broken_row_still_names_distinct_experts(cpu: Cpu) -> None:
    logits = np.random.default_rng(0).standard_normal((2, 256), np.float32)
    logits[0] = np.nan
    ids, weights = call(cpu, logits, None, V3)
    assert len(set(ids[0].tolist())) == 8
    assert ((ids >= 0) & (ids < 256)).all()
    assert np.isnan(weights[0]).all()
    assert np.isfinite(weights[1]).all()


def test_rows_do_not_depend_on_each_other_and_isas_agree(isa: str) -> None:
    logits = np.random.default_rng(4).standard_normal((65, 256), np.float32)
    cpu, plain = Cpu(threads=3, isa=isa), Cpu(threads=1, isa="scalar")
    ids, weights = call(cpu, logits, None, V3)
    for i in range(len(logits)):
        alone = call(plain, logits[i : i + 1], None, V3)
        np.testing.assert_array_equal(alone[0][0], ids[i])
        np.testing.assert_array_equal(alone[1][0], weights[i])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gating": "tanh"}, "gating is 'tanh'"),
        ({"group_score": "sum"}, "group_score is 'sum'"),
        ({"groups": 7}, "7 equal groups"),
        ({"groups_used": 9}, "groups_used is 9"),
        ({"groups_used": 1, "used": 33}, "hold 32 experts"),
    ],
)
def test_wrong_arguments_are_refused(cpu: Cpu, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(cpu, np.zeros((1, 256), np.float32), None, {**V3, **change})
