"""Launches of `src/mla.cu`: attention over the latent cache on compute capability 9.0."""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass

import torch

from ktd_kernels.cuda import driver, kernels
from ktd_kernels.triton.splits import MOST_SPLITS, Ladder

#: The sizes that it takes.
LATENT, ROPE, TOKENS = 512, 64, 64

_HEADS = 64  # of a block
_ATTEND_THREADS, _COMBINE_THREADS = 384, 128
# As in mla.cu: queries and two tiles, maxima and sums of two warpgroups, barriers.
_SHARED = 3 * _HEADS * (LATENT + ROPE) * 2 + 2 * 2 * _HEADS * 4 + 24 * 8
_STEPS = 7


class LadderArgs(ctypes.Structure):
    """Ladder of mla.cu and turing_attention.cu."""

    _fields_ = (
        ("steps", ctypes.c_int),
        ("limit", ctypes.c_int * _STEPS),
        ("length", ctypes.c_int * _STEPS),
    )


class _Arguments(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q_latent", "q_rope", "page_table", "seq_of_row", "context")),
        *((name, ctypes.c_void_p) for name in ("sums", "tops", "out")),
        *((name, ctypes.c_int64) for name in ("q_row", "q_head", "p_row", "p_head", "out_row", "out_head")),
        ("table_row", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("first_row", "heads", "splits", "page_size", "processors")),
        ("scale", ctypes.c_float),
        ("ladder", LadderArgs),
    )


@dataclass(frozen=True, slots=True)
class Splits:
    """Where the splits of some rows go: sums float32 [rows, splits, H, 512] and the logarithms of their
    weights, tops [rows, splits, H]; the first of these rows; and how contexts are cut."""

    sums: torch.Tensor
    tops: torch.Tensor
    first_row: int
    ladder: Ladder


def attend(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    cache: torch.Tensor,
    page_table: torch.Tensor,
    seq_of_row: torch.Tensor,
    context: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    splits: Splits | None,
) -> None:
    """mla_attention of H heads for a contiguous bfloat16 cache in pages of 64 n tokens, without its checks:
    of the rows of `splits`, or of all rows, each in one piece."""
    heads = q_latent.shape[1]
    blocks = -(-heads // _HEADS)
    pages, page_size, width = cache.shape
    many = 0 if splits is None else splits.sums.shape[1]
    arguments = _Arguments(
        q_latent.data_ptr(), q_rope.data_ptr(), page_table.data_ptr(), seq_of_row.data_ptr(),
        context.data_ptr(), 0, 0, out.data_ptr(), *q_latent.stride()[:2], *q_rope.stride()[:2],
        *out.stride()[:2], page_table.stride(0), 0, heads, many, page_size,
        _processors(cache.device.index), scale * math.log2(math.e),
    )  # fmt: skip
    attend_kernel, combine_kernel = _functions(cache.device.index)
    tokens = _map(cache.data_ptr(), pages * page_size, width)
    if splits is None:
        grid = (blocks, len(q_latent), 1)
        attend_kernel.launch(grid, _ATTEND_THREADS, tokens, arguments, shared=_SHARED)
        return
    rows = len(splits.sums)
    arguments.sums, arguments.tops = splits.sums.data_ptr(), splits.tops.data_ptr()
    arguments.first_row = splits.first_row
    arguments.ladder = ladder_args(splits.ladder)
    attend_kernel.launch((blocks, many, rows), _ATTEND_THREADS, tokens, arguments, shared=_SHARED)
    combine_kernel.launch((heads, rows), _COMBINE_THREADS, arguments)


@functools.cache
def _processors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def _functions(device: int) -> tuple[driver.Function, driver.Function]:
    with torch.cuda.device(device):
        module = driver.Module(kernels.mla_cubin(MOST_SPLITS))
    attend_kernel = module.function("attend")
    attend_kernel.allow_shared(_SHARED)
    return attend_kernel, module.function("combine")


@functools.lru_cache(maxsize=256)
def _map(address: int, tokens: int, width: int) -> driver.TensorMap:
    return driver.matrix_map(address, tokens, width, (TOKENS, 64))


@functools.lru_cache(maxsize=16)
def ladder_args(ladder: Ladder) -> LadderArgs:
    """A ladder as the kernels take it."""
    found = LadderArgs(len(ladder))
    for i, (limit, length) in enumerate(ladder):
        found.limit[i], found.length[i] = limit, length
    return found
