"""Attention for compute capability 9.0 and latents of 512 + 64 values, the sizes of every DeepSeek model,
in Gluon.

Written out because Triton's own schedule of the general kernel reaches a quarter of its speed. A block
attends with 64 queries. Tiles of 64 tokens come in pairs. Two warpgroups each score one tile of a pair,
agree on the maximum, hand their weights to each other, and multiply both tiles' weights by their half of
the values: their sums of 64 × 256 just fit into registers. A further warp loads tiles by TMA, halves of a
tile as soon as their places are free.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents

# Barriers, by place in one array; + side or + 2 · tile + half. The weights of a tile take the place of its
# rope once its scores are done, so a rope comes and goes with the half that the other side multiplies by
# these weights.
FULL = gl.constexpr(0)
EMPTY = gl.constexpr(4)
QUERY = gl.constexpr(8)
TOP = gl.constexpr(10)
WEIGHTS = gl.constexpr(12)
TOTAL = gl.constexpr(14)
BARRIERS = gl.constexpr(16)

SCORE = gl.constexpr(
    gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
)
VALUE = gl.constexpr(
    gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 256, 16])
)
WEIGHT = gl.constexpr(gl.DotOperandLayout(operand_index=0, parent=VALUE, k_width=2))
TILE = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))


def descriptors(cache: torch.Tensor) -> tuple[TensorDescriptor, TensorDescriptor]:
    """How TMA sees a cache bfloat16 [pages, page_size, 576]: halves of latents, and ropes, of 64 tokens."""
    tokens = cache.view(-1, cache.shape[2])
    return (
        TensorDescriptor.from_tensor(tokens, [64, 256], TILE.value),
        TensorDescriptor.from_tensor(tokens, [64, 64], TILE.value),
    )


@gluon.jit
def _arrive(bar):
    """By all warps of the partition: every one is done with what the barrier gives away."""
    gl.thread_barrier()
    mbarrier.arrive(bar)


@gluon.jit
def _load_query(pointer, row_stride, first_head, heads, to, WIDTH: gl.constexpr):
    layout: gl.constexpr = (
        gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
        if WIDTH >= 128
        else gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    )
    head = first_head + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
    cols = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, layout))
    values = gl.load(
        pointer + head[:, None] * row_stride + cols[None, :], mask=(head < heads)[:, None], other=0.0
    )
    to.store(values.to(gl.bfloat16))
    fence_async_shared()


@gluon.jit
def _scores(q, qr, c, k, bars, phase, SIDE: gl.constexpr):
    """64 queries · 64 tokens of this side's tile. The half that this side alone uses comes first."""
    s = gl.zeros([64, 64], gl.float32, SCORE)
    mbarrier.wait(bars.index(FULL + 3 * SIDE), phase)
    t = warpgroup_mma(q.index(SIDE), c.index(3 * SIDE).permute((1, 0)), s, use_acc=False, is_async=True)
    mbarrier.wait(bars.index(FULL + 1 + SIDE), phase)
    t = warpgroup_mma(q.index(1 - SIDE), c.index(1 + SIDE).permute((1, 0)), t, is_async=True)
    t = warpgroup_mma(qr, k.index(SIDE).permute((1, 0)), t, is_async=True)
    return warpgroup_mma_wait(0, deps=[t])


@gluon.jit
def _clear_tail(c, start, end):
    """What an unwritten slot holds, NaN perhaps, must not meet a weight of 0."""
    if (start + 64 > end) & (start < end):
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        tokens = start + gl.arange(0, 64, layout=gl.SliceLayout(1, layout))
        for i in gl.static_range(4):
            part = c.slice(64 * i, 64, dim=1)
            part.store(
                gl.where((tokens < end)[:, None], part.load(layout), gl.zeros([64, 64], gl.bfloat16, layout))
            )
        fence_async_shared()
        gl.thread_barrier()


@gluon.jit
def _side(
    q_latent, q_rope, q_head, p_head, out, out_head, tops, first_head, heads, begin, end, scale,
    q, qr, c, k, rows, bars, SIDE: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """One warpgroup: scores of tile SIDE of every pair, half SIDE of the output's columns."""
    R: gl.constexpr = gl.SliceLayout(1, SCORE)
    V: gl.constexpr = gl.SliceLayout(1, VALUE)
    _load_query(q_latent + 256 * SIDE, q_head, first_head, heads, q.index(SIDE), 256)
    if SIDE == 0:
        _load_query(q_rope, p_head, first_head, heads, qr, 64)
    _arrive(bars.index(QUERY + SIDE))
    mbarrier.wait(bars.index(QUERY + 1 - SIDE), 0)
    top = gl.full([64], float("-inf"), gl.float32, R)
    total = gl.zeros([64], gl.float32, R)
    o = gl.zeros([64, 256], gl.float32, VALUE)
    phase = 0
    for start in range(begin, end, 128):
        s = _scores(q, qr, c, k, bars, phase, SIDE)
        tokens = start + 64 * SIDE + gl.arange(0, 64, layout=gl.SliceLayout(0, SCORE))
        s = gl.where((tokens < end)[None, :], s, float("-inf"))
        mine = gl.max(s, 1) * scale
        rows.index(SIDE).store(mine)
        _arrive(bars.index(TOP + SIDE))
        mbarrier.wait(bars.index(TOP + 1 - SIDE), phase)
        new_top = gl.maximum(gl.maximum(mine, rows.index(1 - SIDE).load(R)), top)
        p = gl.exp2(s * scale - new_top[:, None])
        w = p.to(gl.bfloat16)
        k.index(SIDE).store(w)
        fence_async_shared()
        _arrive(bars.index(WEIGHTS + SIDE))
        decay = gl.exp2(top - new_top)
        top = new_top
        total = total * decay + gl.sum(p, 1)
        o = o * gl.convert_layout(decay, V)[:, None]
        mbarrier.wait(bars.index(FULL + 2 - SIDE), phase)
        _clear_tail(c.index(3 * SIDE), start + 64 * SIDE, end)
        _clear_tail(c.index(2 - SIDE), start + 64 * (1 - SIDE), end)
        acc = warpgroup_mma(gl.convert_layout(w, WEIGHT), c.index(3 * SIDE), o, is_async=True)
        mbarrier.wait(bars.index(WEIGHTS + 1 - SIDE), phase)
        acc = warpgroup_mma(k.index(1 - SIDE), c.index(2 - SIDE), acc, is_async=True)
        # Of the first product; its registers are still being written by the second one.
        total = warpgroup_mma_wait(1, deps=[total])
        _arrive(bars.index(EMPTY + 3 * SIDE))
        o = warpgroup_mma_wait(0, deps=[acc])
        _arrive(bars.index(EMPTY + 2 - SIDE))
        phase ^= 1
    rows.index(SIDE).store(total)
    _arrive(bars.index(TOTAL + SIDE))
    mbarrier.wait(bars.index(TOTAL + 1 - SIDE), 0)
    # In one order on both sides, so that their halves are divided by the same number.
    total = rows.index(0).load(R) + rows.index(1).load(R)
    head = first_head + gl.arange(0, 64, layout=V)
    cols = 256 * SIDE + gl.arange(0, 256, layout=gl.SliceLayout(0, VALUE))
    sums = gl.convert_layout(gl.where(total == 0.0, 1.0, total), V)
    gl.store(out + head[:, None] * out_head + cols[None, :], o / sums[:, None], mask=(head < heads)[:, None])
    if SPLIT and SIDE == 0:
        head = first_head + gl.arange(0, 64, layout=R)
        gl.store(tops + head, top + gl.log2(total), mask=head < heads)


@gluon.jit
def _load(halves, ropes, pages, begin, end, nowhere, c, k, bars, PAGE: gl.constexpr):
    """One warp: tiles in the order in which the warpgroups give their places back."""
    phase = 1
    page0 = gl.load(pages + begin // PAGE, mask=begin < end, other=0)
    page1 = gl.load(pages + (begin + 64) // PAGE, mask=begin + 64 < end, other=0)
    for start in range(begin, end, 128):
        at0 = page0 * PAGE + start % PAGE
        # Beyond the cache TMA writes zeros.
        at1 = gl.where(start + 64 < end, page1 * PAGE + (start + 64) % PAGE, nowhere)
        page0 = gl.load(pages + (start + 128) // PAGE, mask=start + 128 < end, other=0)
        page1 = gl.load(pages + (start + 192) // PAGE, mask=start + 192 < end, other=0)
        _load_half(halves, ropes, c, k, bars, 0, 0, at0, phase)
        _load_half(halves, ropes, c, k, bars, 1, 1, at1, phase)
        _load_half(halves, ropes, c, k, bars, 0, 1, at0, phase)
        _load_half(halves, ropes, c, k, bars, 1, 0, at1, phase)
        phase ^= 1


@gluon.jit
def _load_half(halves, ropes, c, k, bars, tile: gl.constexpr, half: gl.constexpr, at, phase):
    mbarrier.wait(bars.index(EMPTY + 2 * tile + half), phase)
    full = bars.index(FULL + 2 * tile + half)
    mbarrier.expect(full, 64 * 256 * 2 + (64 * 64 * 2 if half != tile else 0))
    tma.async_copy_global_to_shared(halves, [at, 256 * half], full, c.index(2 * tile + half))
    if half != tile:
        tma.async_copy_global_to_shared(ropes, [at, 512], full, k.index(tile))


@gluon.jit
def attend_kernel(
    q_latent, q_rope, halves, ropes, page_table, seq_of_row, context, out, tops, first_row, nowhere, scale,
    heads,     q_row, q_head, p_row, p_head, out_row, out_head, table_row, splits,
    LADDER: gl.constexpr, MOST: gl.constexpr, PAGE: gl.constexpr, SPLIT: gl.constexpr,
):  # fmt: skip
    """SPLIT: one split of one row for 64 heads, its sum, normalised, to out [rows, splits, heads, 512] and
    the logarithm (base 2) of its weight to tops [rows, splits, heads]. Otherwise a row's whole context to
    out."""
    first_head = gl.program_id(0) * 64
    if SPLIT:
        split = gl.program_id(1)
        place = gl.program_id(2)
        row = (first_row + place).to(gl.int64)
    else:
        # Later rows of a prompt have longer contexts: they start first.
        split = 0
        place = 0
        row = (gl.num_programs(1) - 1 - gl.program_id(1)).to(gl.int64)
    limit = gl.load(context + row)
    if SPLIT:
        length = gl.cdiv(limit, MOST * 64) * 64
        for i in gl.static_range(len(LADDER)):
            length = gl.where(limit <= LADDER[i][0], LADDER[i][1], length)
        begin = split * length
        if begin >= limit:
            return
        end = gl.minimum(begin + length, limit)
        part = (place * splits + split).to(gl.int64) * heads
        out += part * 512
        tops += part
    else:
        begin = 0
        end = limit
        out += row * out_row
    pages = page_table + gl.load(seq_of_row + row).to(gl.int64) * table_row
    q_latent += row * q_row
    q_rope += row * p_row
    vector: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    q = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 256], TILE)
    qr = gl.allocate_shared_memory(gl.bfloat16, [64, 64], TILE)
    c = gl.allocate_shared_memory(gl.bfloat16, [4, 64, 256], TILE)
    k = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], TILE)
    rows = gl.allocate_shared_memory(gl.float32, [2, 64], vector)
    bars = gl.allocate_shared_memory(gl.int64, [BARRIERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(BARRIERS):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    if SPLIT:
        gdc_launch_dependents()
    gl.warp_specialize(
        [
            (_side, (q_latent, q_rope, q_head, p_head, out, out_head, tops, first_head, heads, begin, end,
                     scale, q, qr, c, k, rows, bars, 0, SPLIT)),
            (_side, (q_latent, q_rope, q_head, p_head, out, out_head, tops, first_head, heads, begin, end,
                     scale, q, qr, c, k, rows, bars, 1, SPLIT)),
            (_load, (halves, ropes, pages, begin, end, nowhere, c, k, bars, PAGE)),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
