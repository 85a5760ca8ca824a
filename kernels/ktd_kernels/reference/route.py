"""Expert selection of DeepSeek-V2 and V3 (HF modeling_deepseek_v2.py, modeling_deepseek_v3.py)."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray


def route(
    logits: NDArray[np.float32],
    bias: NDArray[np.float32] | None,
    gating: Literal["softmax", "sigmoid"],
    groups: int,
    groups_used: int,
    group_score: Literal["max", "top2"],
    used: int,
    normalise: bool,
    scale: float,
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Choose `used` experts a row of logits [n, E] → ids int32 [n, used], weights [n, used].

    Scores are sigmoid or softmax of the logits; choice = score + bias. The experts form `groups` equal runs;
    a group scores the maximum ("max") or the sum of its two largest choices ("top2"); only experts of the
    best `groups_used` groups may be chosen. Weights are the scores without bias, divided by (sum + 1e-20) if
    `normalise`, times `scale`. Ties go to the lowest index; ids come in descending order of choice.
    """
    wide = logits.astype(np.float64)
    if gating == "sigmoid":
        scores = 1.0 / (1.0 + np.exp(-wide))
    else:
        exps = np.exp(wide - wide.max(axis=-1, keepdims=True))
        scores = exps / exps.sum(axis=-1, keepdims=True)
    choice = scores if bias is None else scores + bias.astype(np.float64)
    n, experts = logits.shape
    per_group = choice.reshape(n, groups, experts // groups)
    if group_score == "max":
        group_scores = per_group.max(axis=-1)
    else:
        group_scores = np.sort(per_group, axis=-1)[..., -2:].sum(axis=-1)
    ids = np.empty((n, used), np.int32)
    weights = np.empty((n, used), np.float64)
    for row in range(n):
        best_groups = np.argsort(-group_scores[row], kind="stable")[:groups_used]
        allowed = np.isin(np.arange(experts) // (experts // groups), best_groups)
        masked = np.where(allowed, choice[row], -np.inf)
        ids[row] = np.argsort(-masked, kind="stable")[:used]
        weights[row] = scores[row, ids[row]]
        if normalise:
            weights[row] /= weights[row].sum() + 1e-20
        weights[row] *= scale
    return ids, weights
