"""The router on a device or in Triton's interpreter, against the naive reference in float64.

Scores are float32, so two experts within a few units of each other may change places. Random logits are
drawn on a grid of 1/64, where equal scores are equal in both and unequal ones lie far apart.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from kit_gpu import CUDA, DEVICE, device, nothing, wide
from numpy.typing import NDArray

from ktd_kernels import reference
from ktd_kernels.triton import route

# The interpreter computes with NumPy, which tells of infinities that are meant.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|All-NaN)")

V3 = {
    "gating": "sigmoid",
    "groups": 8,
    "groups_used": 4,
    "group_score": "top2",
    "used": 8,
    "normalise": True,
    "scale": 2.5,
}
V2 = {
    "gating": "softmax",
    "groups": 8,
    "groups_used": 3,
    "group_score": "max",
    "used": 6,
    "normalise": False,
    "scale": 16.0,
}
LITE = {
    "gating": "softmax",
    "groups": 1,
    "groups_used": 1,
    "group_score": "max",
    "used": 6,
    "normalise": False,
    "scale": 1.0,
}
KIMI = {
    "gating": "sigmoid",
    "groups": 1,
    "groups_used": 1,
    "group_score": "top2",
    "used": 8,
    "normalise": True,
    "scale": 2.8,
}
KINDS = pytest.mark.parametrize(
    ("experts", "biased", "kind"),
    [
        (256, True, V3),
        (160, False, V2),
        (64, False, LITE),
        (384, True, KIMI),
        (24, True, {**V3, "groups": 4, "groups_used": 2}),
    ],
    ids=["v3", "v2", "lite", "kimi", "small"],
)


def run(
    logits: NDArray[np.float32], bias: NDArray[np.float32] | None, kind: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    ids, weights = nothing(len(logits), kind["used"], dtype=torch.int32), nothing(len(logits), kind["used"])
    route(device(logits), None if bias is None else device(bias), **kind, ids_out=ids, weights_out=weights)
    return ids, weights


@KINDS
def test_chooses_as_the_reference(experts: int, biased: bool, kind: dict[str, Any]) -> None:
    rng = np.random.default_rng(experts)
    # Distinct in each row, so that softmax, too, keeps them apart.
    logits = (
        np.stack([rng.permutation(experts * 2)[:experts] for _ in range(20 if CUDA else 4)]).astype(
            np.float32
        )
        / 64
        - 4
    )
    bias = (rng.permutation(experts).astype(np.float32) / experts) if biased else None
    ids, weights = run(logits, bias, kind)
    expected_ids, expected = reference.route(logits, bias, **kind)
    clear = _clear(logits, bias, kind)
    assert clear.mean() >= 0.5
    assert np.array_equal(ids.cpu().numpy()[clear], expected_ids[clear])
    # exp: 2 units and the argument's half unit (|x| <= 16); the sum of a row and the division: log2 E + 2.
    assert (
        np.abs(wide(weights) - expected)[clear] <= (32 + np.log2(experts)) * 2.0**-24 * expected[clear]
    ).all()


def _clear(
    logits: NDArray[np.float32], bias: NDArray[np.float32] | None, kind: dict[str, Any]
) -> NDArray[np.bool_]:
    """Rows whose choice stays the same when every choice value moves by what float32 arithmetic may add."""
    rng = np.random.default_rng(1)
    ids, _ = reference.route(logits, bias, **kind)
    same = np.ones(len(logits), bool)
    for _ in range(8):
        shaken = logits + rng.uniform(-1e-5, 1e-5, logits.shape).astype(np.float32)
        same &= (reference.route(shaken, bias, **kind)[0] == ids).all(axis=1)
    return same


@KINDS
def test_ties_go_to_the_lowest(experts: int, biased: bool, kind: dict[str, Any]) -> None:
    logits = np.zeros((2, experts), np.float32)
    logits[1, experts // 2 :] = 1.0
    ids, weights = run(logits, np.zeros(experts, np.float32) if biased else None, kind)
    expected_ids, expected = reference.route(logits, None, **kind)
    assert np.array_equal(ids.cpu().numpy(), expected_ids)
    assert np.allclose(wide(weights), expected, rtol=40 * 2.0**-24, atol=0)


@KINDS
def test_broken_rows_name_distinct_experts(experts: int, biased: bool, kind: dict[str, Any]) -> None:
    logits = np.zeros((2, experts), np.float32)
    logits[0] = np.nan
    logits[1, ::2] = np.nan
    ids = run(logits, np.zeros(experts, np.float32) if biased else None, kind)[0].cpu().numpy()
    for row in ids:
        assert len(set(row)) == kind["used"]
        assert ((row >= 0) & (row < experts)).all()


def test_row_is_the_same_whatever_shares_its_step() -> None:
    logits = np.random.default_rng(5).standard_normal((30, 256), np.float32)
    bias = np.random.default_rng(6).standard_normal(256, np.float32)
    together, alone = run(logits, bias, V3), run(logits[11:12], bias, V3)
    assert all(torch.equal(a[0], t[11]) for a, t in zip(alone, together, strict=True))


def test_refuses_what_does_not_fit() -> None:
    x = torch.zeros(1, 12, device=DEVICE)
    for change, message in (
        ({"groups": 5}, "12 experts do not form 5 equal groups"),
        ({"groups": 4, "groups_used": 2, "used": 7}, "cannot choose 7 of 12 experts from 2 of 4 groups"),
        ({"gating": "relu"}, "gating is 'relu', but must be"),
    ):
        kind = {**V3, "groups": 4, **change}
        ids, weights = nothing(1, kind["used"], dtype=torch.int32), nothing(1, kind["used"])
        with pytest.raises(ValueError, match=message):
            route(x, None, **kind, ids_out=ids, weights_out=weights)  # type: ignore[arg-type]
