"""The attention kernels for every device and every size.

A tile of the cache is loaded once and used for both products: keys are a token's latent with its rotated
key, values the latent alone. Scores and sums are float32; queries, latents and weights enter the tensor
cores in the type of the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ktd_kernels.triton.splits import device_split_length


@triton.jit
def _attend(
    q, q_rope, cache, pages, limit, begin, end, scale, r, dr, page_stride, token_stride,
    PAGE: tl.constexpr, R: tl.constexpr, DR: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Online softmax over tokens [begin, end) of the sequence with page list `pages`. Query row i sees
    tokens below limit [M, 1]. Returns the sum [M, R], the maximum [M] in bits (base 2) and the sum of
    weights [M]."""
    offs_n = tl.arange(0, N)
    offs_r = tl.arange(0, R)
    offs_d = tl.arange(0, DR)
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, R], tl.float32)
    for start in tl.range(begin, end, N):
        tokens = start + offs_n
        valid = tokens < end
        if PAGE % N == 0:
            at = (
                tl.load(pages + start // PAGE).to(tl.int64) * page_stride
                + (start % PAGE + offs_n) * token_stride
            )
        else:
            at = tl.load(pages + tokens // PAGE, mask=valid, other=0).to(tl.int64) * page_stride
            at += (tokens % PAGE) * token_stride
        # Masked so that what an unwritten slot holds, NaN perhaps, never meets a weight of 0.
        c = tl.load(
            cache + at[:, None] + offs_r[None, :], mask=valid[:, None] & (offs_r < r)[None, :], other=0.0
        )
        k = tl.load(
            cache + r + at[:, None] + offs_d[None, :], mask=valid[:, None] & (offs_d < dr)[None, :], other=0.0
        )
        if UPCAST:
            c = c.to(tl.float32)
            k = k.to(tl.float32)
        scores = tl.dot(q, tl.trans(c), input_precision="ieee")
        scores = tl.dot(q_rope, tl.trans(k), scores, input_precision="ieee")
        scores = tl.where(tokens[None, :] < limit, scores * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen no token yet keeps weights of 0.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(top - base)
        total = total * decay + tl.sum(weights, 1)
        acc = acc * decay[:, None]
        p = weights.to(cache.dtype.element_ty)
        if UPCAST:
            p = p.to(tl.float32)
        acc = tl.dot(p, c, acc, input_precision="ieee")
        top = new_top
    return acc, top, total


@triton.jit
def _queries(pointer, stride, width, valid, W: tl.constexpr, TYPE: tl.constexpr, UPCAST: tl.constexpr):
    """Rows of queries, zero-padded to [M, W]; `stride` [M] are their offsets."""
    offs = tl.arange(0, W)
    q = tl.load(
        pointer + stride[:, None] + offs[None, :], mask=valid[:, None] & (offs < width)[None, :], other=0.0
    )
    q = q.to(TYPE)
    if UPCAST:
        q = q.to(tl.float32)
    return q


@triton.jit
def decode_kernel(
    q_latent, q_rope, cache, page_table, seq_of_row, context, sums, tops, first_row, scale, heads, r, dr,
    q_row, q_head, p_row, p_head, page_stride, token_stride, table_row, splits,
    LADDER: tl.constexpr, MOST: tl.constexpr, PAGE: tl.constexpr, R: tl.constexpr, DR: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One split of one row for M heads: its sum, normalised, to sums [rows, splits, heads, r] and the
    logarithm (base 2) of its weight to tops [rows, splits, heads]."""
    head = tl.program_id(0) * M + tl.arange(0, M)
    split = tl.program_id(1)
    place = tl.program_id(2)
    row = (first_row + place).to(tl.int64)
    limit = tl.load(context + row)
    length = device_split_length(limit, LADDER, MOST)
    begin = split * length
    if begin < limit:
        valid = head < heads
        q = _queries(q_latent, row * q_row + head * q_head, r, valid, R, cache.dtype.element_ty, UPCAST)
        qr = _queries(q_rope, row * p_row + head * p_head, dr, valid, DR, cache.dtype.element_ty, UPCAST)
        pages = page_table + tl.load(seq_of_row + row).to(tl.int64) * table_row
        end = tl.minimum(begin + length, limit)
        acc, top, total = _attend(
            q, qr, cache, pages, limit, begin, end, scale, r, dr, page_stride, token_stride,
            PAGE, R, DR, M, N, UPCAST,
        )  # fmt: skip
        offs_r = tl.arange(0, R)
        part = (place * splits + split).to(tl.int64) * heads + head
        out = sums + part[:, None] * r + offs_r[None, :]
        tl.store(out, acc / total[:, None], mask=valid[:, None] & (offs_r < r)[None, :])
        tl.store(tops + part, top + tl.log2(total), mask=valid)


@triton.jit
def prompt_kernel(
    q_latent, q_rope, cache, page_table, seq_of_row, context, out, n, scale, heads, r, dr,
    q_row, q_head, p_row, p_head, o_row, o_head, page_stride, token_stride, table_row,
    PAGE: tl.constexpr, R: tl.constexpr, DR: tl.constexpr, ROWS: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """M / ROWS heads of ROWS rows, whole contexts. Rows of different sequences in one block are done one
    sequence after the other."""
    HEADS: tl.constexpr = M // ROWS
    # Later rows of a prompt have longer contexts: they start first.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    row = (block * ROWS + tl.arange(0, M) // HEADS).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, M) % HEADS
    valid = (row < n) & (head < heads)
    last = 2147483647
    seq = tl.load(seq_of_row + row, mask=row < n, other=last)
    limits = tl.load(context + row, mask=row < n, other=0)
    q = _queries(q_latent, row * q_row + head * q_head, r, valid, R, cache.dtype.element_ty, UPCAST)
    qr = _queries(q_rope, row * p_row + head * p_head, dr, valid, DR, cache.dtype.element_ty, UPCAST)
    offs_r = tl.arange(0, R)
    now = tl.min(seq, 0)
    while now < last:
        mine = seq == now
        limit = tl.where(mine, limits, 0)
        pages = page_table + now.to(tl.int64) * table_row
        acc, _top, total = _attend(
            q, qr, cache, pages, limit[:, None], 0, tl.max(limit, 0), scale, r, dr,
            page_stride, token_stride, PAGE, R, DR, M, N, UPCAST,
        )  # fmt: skip
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        to = out + (row * o_row + head * o_head)[:, None] + offs_r[None, :]
        tl.store(to, acc, mask=(valid & mine)[:, None] & (offs_r < r)[None, :])
        now = tl.min(tl.where(seq > now, seq, last), 0)
