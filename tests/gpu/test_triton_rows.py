"""Row ops on a device or in Triton's interpreter, against the naive references in float64.

Tolerances: every operation in float32 is off by half a unit (2^-24) of its result, exp by 2 units and 2^-24
of its argument; a sum of d values by at most d units of the sum of magnitudes, of which a tree of additions
makes log2 d.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kit_gpu import CUDA, DEVICE, device, nothing, wide
from numpy.typing import NDArray

from ktd_kernels import reference
from ktd_kernels.triton import add_experts, rms_norm, rope, silu_mul, store_latent, store_normed

UNIT = 2.0**-24
ROWS = [1, 17] if CUDA else [3]

# The interpreter computes with NumPy, which tells of infinities that are meant.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value|All-NaN)")


def normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng([seed, *shape]).standard_normal(shape, np.float32)


def table_of(dim: int) -> NDArray[np.float32]:
    return reference.yarn_table(64, dim, factor=40.0)


def positions_of(n: int) -> NDArray[np.int32]:
    return np.random.default_rng(n).integers(0, 64, n).astype(np.int32)


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("d", [6, 512, 1536, 7168])
def test_rms_norm(n: int, d: int) -> None:
    x, weight = normal(n, d + 5), normal(d, seed=1)
    x[0] *= 1e-4
    out = nothing(n, d)
    rms_norm(device(x)[:, :d], device(weight), 1e-6, out)
    expected = reference.rms_norm(x[:, :d], weight, 1e-6)
    # The mean is off by 16 + log2 d units at most (16 values in sequence a thread), its root by half.
    assert (np.abs(wide(out) - expected) <= (24 + np.log2(d)) * UNIT * np.abs(expected)).all()


def test_rms_norm_in_place() -> None:
    x, weight = device(normal(4, 40)), device(normal(40))
    out = nothing(4, 40)
    rms_norm(x, weight, 1e-5, out)
    rms_norm(x, weight, 1e-5, x)
    assert torch.equal(x, out)


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize(("heads", "dim"), [(1, 64), (5, 6), (128 if CUDA else 7, 64)])
def test_rope(n: int, heads: int, dim: int) -> None:
    x, positions, table = normal(n, heads, dim + 3), positions_of(n), table_of(dim)
    on_device = device(x)
    rope(on_device[..., 3:], device(positions), device(table))
    expected = reference.rope(x[..., 3:], positions, table)
    pair = np.hypot(x[..., 3::2], x[..., 4::2]).repeat(2, axis=-1)
    assert (np.abs(wide(on_device[..., 3:]) - expected) <= 4 * UNIT * pair).all()
    assert np.array_equal(wide(on_device[..., :3]), x[..., :3].astype(np.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_store_latent(dtype: torch.dtype) -> None:
    latent = normal(4, 50)
    latent[0, :3] = 1 + 2.0**-8, 1 + 3 * 2.0**-8, 3e38  # two ties and a large value
    slots = np.array([7, 0, -1, 13])
    cache = nothing(4, 4, 48, dtype=dtype)
    store_latent(device(latent)[:, :48], device(slots), cache)
    expected = nothing(16, 48, dtype=dtype)
    for row, slot in enumerate(slots):
        if slot >= 0:
            expected[slot] = device(latent)[row, :48].to(dtype)
    assert torch.equal(torch.nan_to_num(cache.view(16, 48)), torch.nan_to_num(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("latent", "dim"), [(512, 64), (24, 6)])
def test_store_normed_is_the_three_ops(dtype: torch.dtype, latent: int, dim: int) -> None:
    """The same bits as norm, rope and store one after the other."""
    n = 5
    kv, weight = device(normal(n, latent + dim + 2))[:, : latent + dim], device(normal(latent))
    positions, table, slots = (
        device(positions_of(n)),
        device(table_of(dim)),
        device(np.array([9, 2, -1, 4, 0])),
    )
    before = kv.clone()
    fused, plain = (nothing(3, 5, latent + dim, dtype=dtype) for _ in range(2))
    store_normed(kv, weight, 1e-6, positions, table, slots, fused, latent)
    assert torch.equal(kv, before)
    rms_norm(kv[:, :latent], weight, 1e-6, kv[:, :latent])
    rope(kv[:, None, latent:], positions, table)
    store_latent(kv, slots, plain)
    assert torch.isfinite(fused).sum() == 4 * (latent + dim)
    assert torch.equal(torch.nan_to_num(fused), torch.nan_to_num(plain))


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("d", [6, 2048, 2500])
def test_silu_mul(n: int, d: int) -> None:
    gate, up = normal(n, d + 1) * 8, normal(n, d)
    gate[0, :3] = -200.0, 200.0, 0.0
    out = nothing(n, d)
    silu_mul(device(gate)[:, :d], device(up), out)
    with np.errstate(over="ignore"):
        expected = reference.silu(gate[:, :d].astype(np.float64)) * up
    tolerance = (8 + 2 * np.abs(gate[:, :d])) * UNIT * np.abs(expected) + 2.0**-126 * 200
    assert (np.abs(wide(out) - expected) <= tolerance).all()


@pytest.mark.parametrize("accumulate", [False, True])
def test_add_experts(accumulate: bool) -> None:
    partial, weights, start = normal(3, 8, 700), normal(3, 8), normal(3, 700, seed=2)
    out = device(start.copy()) if accumulate else nothing(3, 700)
    add_experts(device(partial), device(weights), out, accumulate)
    terms = weights[..., None].astype(np.float64) * partial
    expected = terms.sum(1) + (start if accumulate else 0)
    assert (np.abs(wide(out) - expected) <= 18 * UNIT * (np.abs(terms).sum(1) + np.abs(start))).all()


def test_row_is_the_same_whatever_shares_its_step() -> None:
    x, weight = device(normal(33, 7168)), device(normal(7168))
    together, alone = nothing(33, 7168), nothing(1, 7168)
    rms_norm(x, weight, 1e-6, together)
    rms_norm(x[20:21], weight, 1e-6, alone)
    assert torch.equal(alone[0], together[20])


def test_refuses_what_does_not_fit() -> None:
    x = torch.zeros(2, 8, device=DEVICE)
    with pytest.raises(ValueError, match=r"weight has shape \[7\], but must have \[8\]"):
        rms_norm(x, x[0, :7], 1e-6, x)
    with pytest.raises(ValueError, match=r"up is torch\.float64, but must be torch\.float32"):
        silu_mul(x, x.double(), x)
    with pytest.raises(ValueError, match="out must be contiguous in its last dimension"):
        silu_mul(x, x, torch.zeros(8, 2, device=DEVICE).T)
