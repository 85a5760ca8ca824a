"""Multi-head latent attention in its absorbed form over the paged latent cache (arXiv 2405.04434, section 2.1).

Keys are a token's latent with its rotated key, values are the latent alone, so a tile of the cache is loaded
once and used for both products. Scores and sums are float32; queries, latents and probabilities enter the
tensor cores in the type of the cache.

Decode: the context of a row is cut into splits whose length depends on that context only, each split is
attended to by itself, and a second kernel adds the splits in ascending order. Prompt: no splits; where a model
has few heads, several rows share a block. Either way a row's bits depend on nothing but the row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from ktd_kernels.triton.checks import INTERPRETED, require
from ktd_kernels.triton.scratch import scratch

Ladder = tuple[tuple[int, int], ...]

# (longest context, tokens a split), longest first; see split_length for what is beyond.
LADDER: Ladder = ((65536, 1024), (16384, 512), (4096, 128), (2048, 64))
MOST_SPLITS = 64

# Scratch of the splits, bytes: more rows than fit are attended to in several launches.
_SCRATCH = 128 << 20


@dataclass(frozen=True, slots=True)
class Tiling:
    """How one launch is cut: rows of queries and tokens a tile, warps, stages of the software pipeline."""

    queries: int
    tokens: int
    warps: int
    stages: int


# Fastest first; a device takes the first one that its shared memory and registers hold.
TILINGS = (
    Tiling(64, 64, 8, 2),
    Tiling(64, 32, 8, 2),
    Tiling(32, 32, 4, 2),
    Tiling(16, 32, 4, 2),
    Tiling(16, 16, 4, 1),
)

# By device and the shape of a block's work; found at the first call.
_taken: dict[tuple[object, ...], Tiling] = {}


def split_length(context: int, ladder: Ladder = LADDER) -> int:
    """Tokens a split of a row with `context` tokens; the kernels compute the same."""
    for limit, length in reversed(ladder):
        if context <= limit:
            return length
    return -(-context // (MOST_SPLITS * 64)) * 64


def most_splits(max_context: int, ladder: Ladder = LADDER) -> int:
    """Largest number of splits of any row of 1 to `max_context` tokens."""
    ends = [min(limit, max_context) for limit, _ in ladder if limit < max_context] + [max_context]
    return max(-(-end // split_length(end, ladder)) for end in ends)


@triton.jit
def _split_length(context, LADDER: tl.constexpr, MOST: tl.constexpr):
    length = tl.cdiv(context, MOST * 64) * 64
    for i in tl.static_range(len(LADDER)):
        length = tl.where(context <= LADDER[i][0], LADDER[i][1], length)
    return length


@triton.jit
def _attend(
    q, q_rope, cache, pages, limit, begin, end, scale, r, dr, page_stride, token_stride,
    PAGE: tl.constexpr, R: tl.constexpr, DR: tl.constexpr, M: tl.constexpr, N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Online softmax over tokens [begin, end) of the sequence with page list `pages`. Query row i sees tokens
    below limit [M, 1]. Returns the sum [M, R], the maximum [M] in bits (base 2) and the sum of weights [M]."""
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
def _decode_kernel(
    q_latent, q_rope, cache, page_table, seq_of_row, context, sums, tops, first_row, scale, heads, r, dr,
    q_row, q_head, p_row, p_head, page_stride, token_stride, table_row, splits,
    LADDER: tl.constexpr, MOST: tl.constexpr, PAGE: tl.constexpr, R: tl.constexpr, DR: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One split of one row for M heads: its sum, normalised, to sums [rows, splits, heads, r] and the logarithm
    (base 2) of its weight to tops [rows, splits, heads]."""
    head = tl.program_id(0) * M + tl.arange(0, M)
    split = tl.program_id(1)
    place = tl.program_id(2)
    row = (first_row + place).to(tl.int64)
    limit = tl.load(context + row)
    length = _split_length(limit, LADDER, MOST)
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
def _combine_kernel(
    sums, tops, context, out, first_row, heads, r, o_row, o_head, splits,
    LADDER: tl.constexpr, MOST: tl.constexpr, SPLITS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Adds the splits of one head of one row in ascending order."""
    head = tl.program_id(0)
    place = tl.program_id(1)
    row = (first_row + place).to(tl.int64)
    limit = tl.load(context + row)
    used = tl.cdiv(limit, _split_length(limit, LADDER, MOST))
    offs = tl.arange(0, SPLITS)
    part = place.to(tl.int64) * splits * heads + head
    logs = tl.load(tops + part + offs * heads, mask=offs < used, other=-1e38)
    top = tl.max(logs, 0)
    total = tl.sum(tl.exp2(logs - top), 0)
    offs_r = tl.arange(0, R)
    acc = tl.zeros([R], tl.float32)
    for s in tl.range(0, used):
        weight = tl.exp2(tl.load(tops + part + s * heads) - top) / total
        acc += weight * tl.load(sums + (part + s * heads) * r + offs_r, mask=offs_r < r, other=0.0)
    tl.store(out + row * o_row + head * o_head + offs_r, acc, mask=offs_r < r)


@triton.jit
def _prompt_kernel(
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
        acc, top, total = _attend(
            q, qr, cache, page_table + now.to(tl.int64) * table_row, limit[:, None], 0, tl.max(limit, 0), scale,
            r, dr, page_stride, token_stride, PAGE, R, DR, M, N, UPCAST,
        )  # fmt: skip
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        to = out + (row * o_row + head * o_head)[:, None] + offs_r[None, :]
        tl.store(to, acc, mask=(valid & mine)[:, None] & (offs_r < r)[None, :])
        now = tl.min(tl.where(seq > now, seq, last), 0)


def mla_attention(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_of_row: torch.Tensor,
    context: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    max_context: int,
    *,
    prompt: bool = False,
) -> None:
    """out = softmax(scale · (q_latent · c + q_rope · k)) · c over row i's first context[i] tokens.

    q_latent [n, H, r], q_rope [n, H, dr] and out [n, H, r] float32, outer dimensions may be strided; cache
    [pages, page_size, r + dr] bfloat16 or float32; page_table int32 [sequences, max_pages], whose unused slots
    are never read; seq_of_row and context int32 [n]. A row with context 0 gives zeros.

    `max_context` bounds every context; launches depend on it and on the shapes alone, contexts are read on the
    device, so a call may be captured in a CUDA graph. `prompt` is for the many rows of a prompt: no splits.
    The two differ in rounding, so which one serves a row must not depend on load.

    Raises ValueError where shapes or types do not fit.
    """
    _check(q_latent, q_rope, cache, page_table, seq_of_row, context, out, max_context)
    n, heads, r = q_latent.shape
    if n == 0 or heads == 0:
        return
    launch = launch_prompt if prompt else launch_decode
    # Never from the number of rows: another tile may round otherwise.
    queries = 64 if prompt else min(64, max(16, triton.next_power_of_2(heads)))
    key = (cache.device, cache.dtype, cache.shape[1:], r, queries, prompt)
    for tiling in TILINGS if key not in _taken else (_taken[key],):
        tiling = replace(tiling, queries=min(tiling.queries, queries))
        try:
            launch(q_latent, q_rope, cache, page_table, seq_of_row, context, scale, out, max_context, tiling)
        except triton.runtime.errors.OutOfResources:
            continue
        _taken[key] = tiling
        return
    raise ValueError(
        f"a latent of {cache.shape[2]} values is too long for {cache.device}: its shared memory is too small"
    )


def launch_decode(
    q_latent, q_rope, cache, page_table, seq_of_row, context, scale, out, max_context, tiling, ladder=LADDER
):
    n, heads, r = q_latent.shape
    splits = most_splits(max_context, ladder)
    row_bytes = splits * heads * (r + 1) * 4
    group = max(1, min(n, _SCRATCH // row_bytes))
    sums = scratch("mla_sums", (group, splits, heads, r), cache.device)
    tops = scratch("mla_tops", (group, splits, heads), cache.device)
    for first in range(0, n, group):
        rows = min(group, n - first)
        _decode_kernel[(triton.cdiv(heads, tiling.queries), splits, rows)](
            q_latent, q_rope, cache, page_table, seq_of_row, context, sums, tops, first,
            scale * math.log2(math.e), heads, r, q_rope.shape[2],
            q_latent.stride(0), q_latent.stride(1), q_rope.stride(0), q_rope.stride(1),
            cache.stride(0), cache.stride(1), page_table.stride(0), splits,
            LADDER=ladder, MOST=MOST_SPLITS, PAGE=cache.shape[1], R=_padded(r), DR=_padded(q_rope.shape[2]),
            M=tiling.queries, N=tiling.tokens, UPCAST=INTERPRETED,
            num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip
        _combine_kernel[(heads, rows)](
            sums, tops, context, out, first, heads, r, out.stride(0), out.stride(1), splits,
            LADDER=ladder, MOST=MOST_SPLITS, SPLITS=triton.next_power_of_2(splits), R=_padded(r),
            num_warps=4, num_stages=4,
        )  # fmt: skip


def launch_prompt(q_latent, q_rope, cache, page_table, seq_of_row, context, scale, out, max_context, tiling):
    n, heads, r = q_latent.shape
    rows = max(1, tiling.queries // triton.next_power_of_2(heads))
    _prompt_kernel[(triton.cdiv(n, rows), triton.cdiv(heads, tiling.queries // rows))](
        q_latent, q_rope, cache, page_table, seq_of_row, context, out, n,
        scale * math.log2(math.e), heads, r, q_rope.shape[2],
        q_latent.stride(0), q_latent.stride(1), q_rope.stride(0), q_rope.stride(1), out.stride(0), out.stride(1),
        cache.stride(0), cache.stride(1), page_table.stride(0),
        PAGE=cache.shape[1], R=_padded(r), DR=_padded(q_rope.shape[2]), ROWS=rows,
        M=tiling.queries, N=tiling.tokens, UPCAST=INTERPRETED,
        num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip


def _padded(width: int) -> int:
    """Tensor cores take widths from 16."""
    return max(16, triton.next_power_of_2(width))


def _check(q_latent, q_rope, cache, page_table, seq_of_row, context, out, max_context):
    n, heads, r = q_latent.shape if q_latent.dim() == 3 else (0, 0, 0)
    dr = q_rope.shape[-1]
    for name, tensor, shape, types in (
        ("q_latent", q_latent, (n, heads, r), (torch.float32,)),
        ("q_rope", q_rope, (n, heads, dr), (torch.float32,)),
        ("out", out, (n, heads, r), (torch.float32,)),
        ("cache", cache, (*cache.shape[:2], r + dr), (torch.bfloat16, torch.float32)),
        ("page_table", page_table, (page_table.shape[0], page_table.shape[-1]), (torch.int32,)),
        ("seq_of_row", seq_of_row, (n,), (torch.int32,)),
        ("context", context, (n,), (torch.int32,)),
    ):
        require(name, tensor, shape, types, q_latent.device)
    if not 1 <= max_context <= page_table.shape[1] * cache.shape[1]:
        raise ValueError(
            f"max_context is {max_context}, but must be 1 to {page_table.shape[1] * cache.shape[1]},"
            " the tokens that a row of page_table can name"
        )
