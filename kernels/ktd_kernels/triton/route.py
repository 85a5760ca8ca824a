"""Expert selection of DeepSeek-V2 and V3 on the device (kernels/csrc/ops_route.cc says the same for the
CPU)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ktd_kernels.triton.checks import early, require

_FLOAT = (torch.float32,)


@triton.jit
def _ranked(values, index):
    """int64 keys whose order is that of `values`, equal values in descending order of `index`: the largest
    key is the first of the best. NaN ranks below everything, 0 and -0 are equal; no key is below 1 - 2^63."""
    bits = tl.where(values == 0.0, 0.0, values).to(tl.int32, bitcast=True)
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(values != values, -2147483647, order)
    return order.to(tl.int64) * 4294967296 + (2147483647 - index).to(tl.int64)


@triton.jit
def _route_kernel(
    logits, bias, ids, weights, experts, groups, size, groups_used, used, scale,
    logits_row, ids_row, weights_row,
    SIGMOID: tl.constexpr, BIAS: tl.constexpr, TOP2: tl.constexpr, NORMALISE: tl.constexpr,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, USED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One row. Experts lie as [GROUPS, SIZE], so that a group's score is a reduction along one axis."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, GROUPS)
    e = g[:, None] * size + tl.arange(0, SIZE)[None, :]
    real = (g < groups)[:, None] & (tl.arange(0, SIZE) < size)[None, :]
    x = tl.load(logits + row * logits_row + e, mask=real, other=float("-inf"))
    if SIGMOID:
        scores = 1.0 / (1.0 + tl.exp(-x))
    else:
        scores = tl.exp(x - tl.max(tl.max(x, 1), 0))
        scores = scores / tl.sum(tl.sum(scores, 1), 0)
    choice = scores
    if BIAS:
        choice += tl.load(bias + e, mask=real, other=0.0)
    never = -9223372036854775807
    if groups_used < groups:
        # NaN never is a group's best, as on the CPU.
        counted = tl.where(real & (choice == choice), choice, float("-inf"))
        score = tl.max(counted, 1)
        if TOP2:
            first = tl.min(tl.where(counted == score[:, None], e, 2147483647), 1)
            score += tl.max(tl.where(e == first[:, None], float("-inf"), counted), 1)
        group_keys = tl.where(g < groups, _ranked(score, g), never)
        allowed = tl.zeros([GROUPS], tl.int1)
        for _ in range(groups_used):
            best = tl.max(group_keys, 0)
            allowed = allowed | (group_keys == best)
            group_keys = tl.where(group_keys == best, never, group_keys)
        real = real & allowed[:, None]
    keys = tl.where(real, _ranked(choice, e), never)
    place = tl.arange(0, USED)
    chosen = tl.zeros([USED], tl.float32)
    total = 0.0
    for k in range(used):
        best = tl.max(tl.max(keys, 1), 0)
        found = keys == best
        weight = tl.sum(tl.sum(tl.where(found, scores, 0.0), 1), 0)
        tl.store(ids + row * ids_row + k, tl.sum(tl.sum(tl.where(found, e, 0), 1), 0))
        total += weight
        chosen = tl.where(place == k, weight, chosen)
        keys = tl.where(found, never, keys)
    if NORMALISE:
        chosen = chosen / (total + 1e-20)
    tl.store(weights + row * weights_row + place, chosen * scale, mask=place < used)


def route(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    gating: str,
    groups: int,
    groups_used: int,
    group_score: str,
    used: int,
    normalise: bool,
    scale: float,
    ids_out: torch.Tensor,
    weights_out: torch.Tensor,
) -> None:
    """Choose `used` experts a row: logits float32 [n, E], bias float32 [E] or None (for the choice only),
    gating 'softmax' or 'sigmoid', group_score 'max' or 'top2'; ids_out int32 [n, used] in descending order
    of choice, of equals the lowest first; weights_out float32 [n, used]. Raises ValueError where arguments
    do not fit."""
    check_route(logits, bias, gating, groups, groups_used, group_score, used, ids_out, weights_out)
    n, experts = logits.shape
    if n:
        size = experts // groups
        _route_kernel[(n,)](
            logits, bias, ids_out, weights_out, experts, groups, size, groups_used, used, scale,
            logits.stride(0), ids_out.stride(0), weights_out.stride(0),
            SIGMOID=gating == "sigmoid", BIAS=bias is not None, TOP2=group_score == "top2",
            NORMALISE=normalise,
            GROUPS=triton.next_power_of_2(groups), SIZE=triton.next_power_of_2(size),
            USED=triton.next_power_of_2(used), EARLY=early(logits.device),
            num_warps=1 if experts <= 128 else 4, launch_pdl=early(logits.device),
        )  # fmt: skip


def check_route(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    gating: str,
    groups: int,
    groups_used: int,
    group_score: str,
    used: int,
    ids_out: torch.Tensor,
    weights_out: torch.Tensor,
) -> None:
    """Raises ValueError where arguments of route do not fit."""
    n, experts = logits.shape
    require("logits", logits, (n, experts), _FLOAT, logits.device)
    if bias is not None:
        require("bias", bias, (experts,), _FLOAT, logits.device)
    require("ids_out", ids_out, (n, used), (torch.int32,), logits.device)
    require("weights_out", weights_out, (n, used), _FLOAT, logits.device)
    if gating not in ("softmax", "sigmoid"):
        raise ValueError(f"gating is {gating!r}, but must be 'softmax' or 'sigmoid'")
    if group_score not in ("max", "top2"):
        raise ValueError(f"group_score is {group_score!r}, but must be 'max' or 'top2'")
    if groups < 1 or experts % groups:
        raise ValueError(f"{experts} experts do not form {groups} equal groups")
    if not 1 <= groups_used <= groups or not 1 <= used <= groups_used * (experts // groups):
        raise ValueError(f"cannot choose {used} of {experts} experts from {groups_used} of {groups} groups")
