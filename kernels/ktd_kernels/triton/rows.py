"""Ops on rows of activations: norm, rotary embedding, storing of latents, SwiGLU, sum of experts. Float32
throughout; a row's bits depend on that row only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ktd_kernels.triton.checks import early, require

_FLOAT = (torch.float32,)
_CACHE = (torch.bfloat16, torch.float32)


@triton.jit
def _normed(x, weight, d, eps, D: tl.constexpr):
    offs = tl.arange(0, D)
    values = tl.load(x + offs, mask=offs < d, other=0.0)
    mean = tl.sum(values * values, 0) / d
    return values / tl.sqrt_rn(mean + eps) * tl.load(weight + offs, mask=offs < d, other=0.0)


@triton.jit
def _rms_norm_kernel(x, weight, out, d, eps, x_row, out_row, D: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, D)
    tl.store(out + row * out_row + offs, _normed(x + row * x_row, weight, d, eps, D), mask=offs < d)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """out = x / sqrt(mean(x²) + eps) · weight; x and out float32 [n, d] with strided rows, may be the same;
    weight float32 [d]. Raises ValueError where shapes or types do not fit."""
    check_rms_norm(x, weight, out)
    n, d = x.shape
    if n:
        width = triton.next_power_of_2(d)
        _rms_norm_kernel[(n,)](
            x, weight, out, d, eps, x.stride(0), out.stride(0),
            D=width, EARLY=early(x.device), num_warps=_warps(width), launch_pdl=early(x.device),
        )  # fmt: skip


@triton.jit
def _rotated(x, angles, dr, DR: tl.constexpr):
    """Even and odd values of the pairs at `x`, turned by the table row at `angles`."""
    pair = tl.arange(0, DR // 2)
    inside = 2 * pair < dr
    even = tl.load(x + 2 * pair, mask=inside, other=0.0)
    odd = tl.load(x + 2 * pair + 1, mask=inside, other=0.0)
    cos = tl.load(angles + 2 * pair, mask=inside, other=0.0)
    sin = tl.load(angles + 2 * pair + 1, mask=inside, other=0.0)
    return even * cos - odd * sin, even * sin + odd * cos


@triton.jit
def _rope_kernel(x, positions, table, dr, x_row, x_head, table_row, DR: tl.constexpr, EARLY: tl.constexpr):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    x += row * x_row + tl.program_id(1) * x_head
    even, odd = _rotated(x, table + tl.load(positions + row).to(tl.int64) * table_row, dr, DR)
    pair = tl.arange(0, DR // 2)
    tl.store(x + 2 * pair, even, mask=2 * pair < dr)
    tl.store(x + 2 * pair + 1, odd, mask=2 * pair < dr)


def rope(x: torch.Tensor, positions: torch.Tensor, table: torch.Tensor) -> None:
    """Rotate the pairs (2i, 2i + 1) of x float32 [n, H, dr] in place, outer dimensions may be strided;
    positions int32 [n]; table float32 [max_pos, dr] holds cos, sin per pair. Raises ValueError where shapes
    or types do not fit."""
    check_rope(x, positions, table)
    n, heads, dr = x.shape
    if n and heads:
        _rope_kernel[(n, heads)](
            x, positions, table, dr, x.stride(0), x.stride(1), table.stride(0),
            DR=triton.next_power_of_2(dr), EARLY=early(x.device), num_warps=1, launch_pdl=early(x.device),
        )  # fmt: skip


@triton.jit
def _store_latent_kernel(
    latent, slots, cache, w, page_size, latent_row, page_stride, token_stride, W: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if slot >= 0:
        offs = tl.arange(0, W)
        to = cache + slot // page_size * page_stride + slot % page_size * token_stride
        values = tl.load(latent + row * latent_row + offs, mask=offs < w)
        tl.store(to + offs, values.to(cache.dtype.element_ty), mask=offs < w)


def store_latent(latent: torch.Tensor, slots: torch.Tensor, cache: torch.Tensor) -> None:
    """Write latent float32 [n, w] (strided rows) to slots int64 [n] of cache [pages, page_size, w], float32
    or bfloat16 (rounded to nearest even). slot = page · page_size + offset; a negative slot stores nothing
    (rows that pad a graph's batch). Raises ValueError where shapes or types do not fit."""
    n, w = latent.shape
    require("latent", latent, (n, w), _FLOAT, latent.device)
    _check_store(slots, cache, n, w, latent.device)
    if n:
        _store_latent_kernel[(n,)](
            latent, slots, cache, w, cache.shape[1], latent.stride(0), cache.stride(0), cache.stride(1),
            W=triton.next_power_of_2(w), num_warps=4,
        )  # fmt: skip


@triton.jit
def _store_normed_kernel(
    kv, weight, eps, positions, table, slots, cache, r, dr, page_size,
    kv_row, table_row, page_stride, token_stride,
    R: tl.constexpr, DR: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if slot >= 0:
        kv += row * kv_row
        to = cache + slot // page_size * page_stride + slot % page_size * token_stride
        offs = tl.arange(0, R)
        tl.store(to + offs, _normed(kv, weight, r, eps, R).to(cache.dtype.element_ty), mask=offs < r)
        even, odd = _rotated(kv + r, table + tl.load(positions + row).to(tl.int64) * table_row, dr, DR)
        pair = tl.arange(0, DR // 2)
        tl.store(to + r + 2 * pair, even.to(cache.dtype.element_ty), mask=2 * pair < dr)
        tl.store(to + r + 2 * pair + 1, odd.to(cache.dtype.element_ty), mask=2 * pair < dr)


def store_normed(
    kv: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    positions: torch.Tensor,
    table: torch.Tensor,
    slots: torch.Tensor,
    cache: torch.Tensor,
    kv_lora: int,
) -> None:
    """store_latent of kv float32 [n, kv_lora + dr] after rms_norm(weight, eps) of its first kv_lora values
    and rope(positions, table) of the others; kv is left as it is. Raises ValueError where shapes or types
    do not fit."""
    check_store_normed(kv, weight, positions, table, slots, cache, kv_lora)
    n, w = kv.shape
    dr = w - kv_lora
    if n:
        _store_normed_kernel[(n,)](
            kv, weight, eps, positions, table, slots, cache, kv_lora, dr, cache.shape[1],
            kv.stride(0), table.stride(0), cache.stride(0), cache.stride(1),
            R=triton.next_power_of_2(kv_lora), DR=triton.next_power_of_2(dr),
            EARLY=early(kv.device), num_warps=4, launch_pdl=early(kv.device),
        )  # fmt: skip


@triton.jit
def _silu_mul_kernel(gate, up, out, d, gate_row, up_row, out_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + row * gate_row + offs, mask=offs < d)
    u = tl.load(up + row * up_row + offs, mask=offs < d)
    tl.store(out + row * out_row + offs, g / (1.0 + tl.exp(-g)) * u, mask=offs < d)


def silu_mul(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor) -> None:
    """out = gate · sigmoid(gate) · up, float32 [n, d] with strided rows; out may be gate or up. Raises
    ValueError where shapes or types do not fit."""
    n, d = gate.shape
    for name, tensor in (("gate", gate), ("up", up), ("out", out)):
        require(name, tensor, (n, d), _FLOAT, gate.device)
    if n:
        _silu_mul_kernel[(n, triton.cdiv(d, 1024))](
            gate, up, out, d, gate.stride(0), up.stride(0), out.stride(0), BLOCK=1024, num_warps=4
        )


@triton.jit
def _add_experts_kernel(
    partial, weights, out, k, d, partial_row, partial_expert, weights_row, out_row,
    ACCUMULATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for j in range(k):
        values = tl.load(partial + row * partial_row + j * partial_expert + offs, mask=offs < d)
        acc += tl.load(weights + row * weights_row + j) * values
    to = out + row * out_row + offs
    if ACCUMULATE:
        acc += tl.load(to, mask=offs < d)
    tl.store(to, acc, mask=offs < d)


def add_experts(
    partial: torch.Tensor, weights: torch.Tensor, out: torch.Tensor, accumulate: bool = False
) -> None:
    """out [n, d] (+)= sum over j of weights[n, j] · partial[n, j, :], added in the order of j; partial
    float32 [n, k, d], weights float32 [n, k]. Raises ValueError where shapes or types do not fit."""
    n, k, d = partial.shape
    require("partial", partial, (n, k, d), _FLOAT, partial.device)
    require("weights", weights, (n, k), _FLOAT, partial.device)
    require("out", out, (n, d), _FLOAT, partial.device)
    if n:
        _add_experts_kernel[(n, triton.cdiv(d, 512))](
            partial, weights, out, k, d, *partial.stride()[:2], weights.stride(0), out.stride(0),
            ACCUMULATE=accumulate, BLOCK=512, num_warps=4,
        )  # fmt: skip


def check_rms_norm(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    """Raises ValueError where arguments of rms_norm do not fit."""
    n, d = x.shape
    require("x", x, (n, d), _FLOAT, x.device)
    require("weight", weight, (d,), _FLOAT, x.device)
    require("out", out, (n, d), _FLOAT, x.device)


def check_rope(x: torch.Tensor, positions: torch.Tensor, table: torch.Tensor) -> None:
    """Raises ValueError where arguments of rope do not fit."""
    n, heads, dr = x.shape
    require("x", x, (n, heads, dr), _FLOAT, x.device)
    require("positions", positions, (n,), (torch.int32,), x.device)
    require("table", table, (table.shape[0], dr), _FLOAT, x.device)


def check_store_normed(
    kv: torch.Tensor,
    weight: torch.Tensor,
    positions: torch.Tensor,
    table: torch.Tensor,
    slots: torch.Tensor,
    cache: torch.Tensor,
    kv_lora: int,
) -> None:
    """Raises ValueError where arguments of store_normed do not fit."""
    n, w = kv.shape
    require("kv", kv, (n, w), _FLOAT, kv.device)
    require("weight", weight, (kv_lora,), _FLOAT, kv.device)
    require("positions", positions, (n,), (torch.int32,), kv.device)
    require("table", table, (table.shape[0], w - kv_lora), _FLOAT, kv.device)
    _check_store(slots, cache, n, w, kv.device)


def _check_store(slots: torch.Tensor, cache: torch.Tensor, n: int, w: int, device: torch.device) -> None:
    require("slots", slots, (n,), (torch.int64,), device)
    require("cache", cache, (*cache.shape[:2], w), _CACHE, device)


def _warps(width: int) -> int:
    """Warps that leave a thread about 8 values."""
    return max(1, min(16, width // 256))
