"""How a row's context is cut into splits that are attended to side by side, and how these are added.

The length of a split depends on the row's own context only, and the splits are added in one order, so what
shares a row's step changes none of its bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

Ladder = tuple[tuple[int, int], ...]

# (longest context, tokens a split), longest first; see split_length for what is beyond.
LADDER: Ladder = ((65536, 1024), (16384, 512), (8192, 1024), (4096, 256), (2048, 128))
MOST_SPLITS = 64


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
def device_split_length(context, LADDER: tl.constexpr, MOST: tl.constexpr):
    length = tl.cdiv(context, MOST * 64) * 64
    for i in tl.static_range(len(LADDER)):
        length = tl.where(context <= LADDER[i][0], LADDER[i][1], length)
    return length


@triton.jit
def combine_kernel(
    sums, tops, context, out, first_row, heads, r, o_row, o_head, splits,
    LADDER: tl.constexpr, MOST: tl.constexpr, STEP: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Adds the splits of COLS columns of one head of one row, STEP splits at a time. The order does not
    depend on how many splits a row might have had."""
    head = tl.program_id(0)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    place = tl.program_id(2)
    row = (first_row + place).to(tl.int64)
    limit = tl.load(context + row)
    used = tl.cdiv(limit, device_split_length(limit, LADDER, MOST))
    part = place.to(tl.int64) * splits * heads + head
    every = tl.arange(0, MOST)
    logs = tl.load(tops + part + every * heads, mask=every < used, other=-1e38)
    top = tl.max(logs, 0)
    total = tl.sum(tl.exp2(logs - top), 0)
    acc = tl.zeros([COLS], tl.float32)
    for start in tl.range(0, used, STEP):
        at = start + tl.arange(0, STEP)
        weights = tl.exp2(tl.load(tops + part + at * heads, mask=at < used, other=-1e38) - top) / total
        values = sums + (part + at * heads)[:, None] * r + cols[None, :]
        values = tl.load(values, mask=(at < used)[:, None] & (cols < r)[None, :], other=0.0)
        acc += tl.sum(weights[:, None] * values, 0)
    tl.store(out + row * o_row + head * o_head + cols, acc, mask=cols < r)
