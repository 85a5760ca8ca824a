"""Multi-head latent attention in its absorbed form over the paged latent cache (arXiv 2405.04434, section
2.1): which kernel serves a call, and its launches."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import torch
import triton

from ktd_kernels.cuda import mla
from ktd_kernels.triton import attention_general as general
from ktd_kernels.triton.checks import INTERPRETED, require
from ktd_kernels.triton.scratch import scratch
from ktd_kernels.triton.splits import LADDER, MOST_SPLITS, combine_kernel, most_splits

# Bytes of the splits' sums: more rows than fit are attended to in several launches.
_SCRATCH = 128 << 20


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a launch of the general kernel is cut: query rows and tokens a tile, warps, pipeline stages."""

    queries: int
    tokens: int
    warps: int
    stages: int


# Fastest first; a device takes the first one that its shared memory holds.
_TILINGS = (
    Tiling(64, 64, 8, 2),
    Tiling(64, 32, 8, 2),
    Tiling(32, 32, 4, 2),
    Tiling(16, 32, 4, 2),
    Tiling(16, 16, 4, 1),
)

# By what decides it; found at the first call.
_taken: dict[tuple[object, ...], Tiling] = {}


@dataclass(frozen=True, slots=True)
class Call:
    """The arguments of mla_attention."""

    q_latent: torch.Tensor
    q_rope: torch.Tensor
    cache: torch.Tensor
    page_table: torch.Tensor
    seq_of_row: torch.Tensor
    context: torch.Tensor
    scale: float
    out: torch.Tensor
    max_context: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Rows, heads, latent, rope."""
        n, heads, r = self.q_latent.shape
        return n, heads, r, self.q_rope.shape[2]

    @property
    def query_strides(self) -> tuple[int, ...]:
        return (*self.q_latent.stride()[:2], *self.q_rope.stride()[:2])


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
    [pages, page_size, r + dr] bfloat16 or float32; page_table int32 [sequences, max_pages], whose unused
    slots are never read; seq_of_row and context int32 [n]. A row with context 0 gives zeros.

    `max_context` bounds every context; launches depend on it and on the shapes alone, contexts are read on
    the device, so a call may be captured in a CUDA graph once a call of the same shapes has been made.
    `prompt` is for the many rows of a prompt: no splits. The two round differently, so which one serves a
    row must not depend on load. Calls on one device share scratch memory and must be ordered.

    Raises ValueError where shapes or types do not fit.
    """
    call = Call(q_latent, q_rope, cache, page_table, seq_of_row, context, scale, out, max_context)
    check_call(call)
    n, heads, r, dr = call.sizes
    if n == 0 or heads == 0:
        return
    if (
        _hopper(cache.device)
        and (r, dr, cache.dtype) == (mla.LATENT, mla.ROPE, torch.bfloat16)
        and cache.shape[1] % mla.TOKENS == 0
        and cache.is_contiguous()
        and all(_in_fours(x) for x in (q_latent, q_rope, out))
    ):
        _launch_hopper(call, prompt)
    else:
        _launch_general(call, prompt)


def _in_fours(x: torch.Tensor) -> bool:
    """Whether rows of x can be read and written 16 bytes at a time."""
    return x.data_ptr() % 16 == 0 and all(stride % 4 == 0 for stride in x.stride()[:-1])


@functools.cache
def _hopper(device: torch.device) -> bool:
    """Whether the device has compute capability 9.0, whose instructions mla.cu uses."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def _launch_hopper(call: Call, prompt: bool) -> None:
    arguments = (
        *(call.q_latent, call.q_rope, call.cache, call.page_table, call.seq_of_row, call.context),
        *(call.scale, call.out),
    )
    if prompt:
        mla.attend(*arguments, None)
        return
    for sums, tops, first, rows in row_groups(call):
        mla.attend(*arguments, mla.Splits(sums[:rows], tops, first, LADDER))


def _launch_general(call: Call, prompt: bool) -> None:
    _, heads, r, _ = call.sizes
    # Never from the number of rows: another tile may round otherwise.
    queries = 64 if prompt else min(64, max(16, triton.next_power_of_2(heads)))
    key = (call.cache.device, call.cache.dtype, call.cache.shape[1:], r, queries, prompt)
    for tiling in _TILINGS if key not in _taken else (_taken[key],):
        tiling = replace(tiling, queries=min(tiling.queries, queries))
        try:
            (_general_prompt if prompt else _general_decode)(call, tiling)
        except triton.runtime.errors.OutOfResources:
            continue
        _taken[key] = tiling
        return
    raise ValueError(f"a latent of {r} values is too long for the shared memory of {call.cache.device}")


def _general_decode(call: Call, tiling: Tiling) -> None:
    _, heads, r, dr = call.sizes
    for sums, tops, first, rows in row_groups(call):
        splits = sums.shape[1]
        general.decode_kernel[(triton.cdiv(heads, tiling.queries), splits, rows)](
            call.q_latent, call.q_rope, call.cache, call.page_table, call.seq_of_row, call.context,
            sums, tops, first,
            call.scale * math.log2(math.e), heads, r, dr, *call.query_strides, *call.cache.stride()[:2],
            call.page_table.stride(0), splits,
            LADDER=LADDER, MOST=MOST_SPLITS, PAGE=call.cache.shape[1], R=_padded(r), DR=_padded(dr),
            M=tiling.queries, N=tiling.tokens, UPCAST=INTERPRETED,
            num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip
        _combine(call, sums, tops, first, rows)


def _general_prompt(call: Call, tiling: Tiling) -> None:
    n, heads, r, dr = call.sizes
    rows = max(1, tiling.queries // triton.next_power_of_2(heads))
    general.prompt_kernel[(triton.cdiv(n, rows), triton.cdiv(heads, tiling.queries // rows))](
        call.q_latent, call.q_rope, call.cache, call.page_table, call.seq_of_row, call.context, call.out, n,
        call.scale * math.log2(math.e), heads, r, dr, *call.query_strides, *call.out.stride()[:2],
        *call.cache.stride()[:2], call.page_table.stride(0),
        PAGE=call.cache.shape[1], R=_padded(r), DR=_padded(dr), ROWS=rows,
        M=tiling.queries, N=tiling.tokens, UPCAST=INTERPRETED,
        num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip


def row_groups(call: Call) -> list[tuple[torch.Tensor, torch.Tensor, int, int]]:
    """(sums, tops, first row, rows) of each launch: as many rows as the scratch memory has room for."""
    n, heads, r, _ = call.sizes
    splits = most_splits(call.max_context)
    rows = max(1, min(n, _SCRATCH // (splits * heads * r * 4)))
    sums = scratch("mla_sums", (rows, splits, heads, r), call.cache.device)
    tops = scratch("mla_tops", (rows, splits, heads), call.cache.device)
    return [(sums, tops, first, min(rows, n - first)) for first in range(0, n, rows)]


def _combine(call: Call, sums: torch.Tensor, tops: torch.Tensor, first: int, rows: int) -> None:
    _, splits, heads, r = sums.shape
    combine_kernel[(heads, triton.cdiv(r, 128), rows)](
        sums, tops, call.context, call.out, first, heads, r, *call.out.stride()[:2], splits,
        LADDER=LADDER, MOST=MOST_SPLITS, STEP=16, COLS=128, num_warps=4,
    )  # fmt: skip


def _padded(width: int) -> int:
    """Tensor cores take widths from 16."""
    return max(16, int(triton.next_power_of_2(width)))


def check_call(call: Call) -> None:
    """Raises ValueError where shapes or types do not fit."""
    if (
        call.q_latent.dim() != 3
        or call.q_rope.dim() != 3
        or call.cache.dim() != 3
        or call.page_table.dim() != 2
    ):
        raise ValueError("q_latent, q_rope and cache must have three dimensions and page_table two")
    n, heads, r, dr = call.sizes
    floats = (torch.float32,)
    for name, tensor, shape, types in (
        ("q_latent", call.q_latent, (n, heads, r), floats),
        ("q_rope", call.q_rope, (n, heads, dr), floats),
        ("out", call.out, (n, heads, r), floats),
        ("cache", call.cache, (*call.cache.shape[:2], r + dr), (torch.bfloat16, torch.float32)),
        ("page_table", call.page_table, tuple(call.page_table.shape), (torch.int32,)),
        ("seq_of_row", call.seq_of_row, (n,), (torch.int32,)),
        ("context", call.context, (n,), (torch.int32,)),
    ):
        require(name, tensor, shape, types, call.q_latent.device)
    tokens = call.page_table.shape[1] * call.cache.shape[1]
    if not 1 <= call.max_context <= tokens:
        raise ValueError(
            f"max_context is {call.max_context}, but must be 1 to {tokens},"
            " the tokens that a row of page_table can name"
        )
