"""Experts for many tokens: pairs of token and expert sorted by expert, weights decoded into tensor cores.

One launch for gate, up and SwiGLU, one for down, one for the weighted sum (src/grouped.cu).
"""

from __future__ import annotations

import ctypes
import functools

import torch

from ktd_kernels.cuda import kernels
from ktd_kernels.cuda.driver import Module
from ktd_kernels.cuda.product import activation_module
from ktd_kernels.cuda.weight import GpuWeight, architecture, launch_over

_THREADS, _ROWS = 256, 128  # kThreads and kRows of grouped.cu
_HIDDEN = 1 << 26  # bfloat16 values between up and down that are kept at a time
_PARTIAL = 1 << 24  # float32 results of pairs that wait for their sum
#: Experts of a token at most (kMostUsed of activations.cu).
MOST_USED = 64


class GroupedArgs(ctypes.Structure):
    """GroupedArgs of grouped.cu."""

    _fields_ = (
        ("w", ctypes.c_void_p * 2),
        ("matrix_bytes", ctypes.c_uint64),
        ("blocks", ctypes.c_uint64),
        *((name, ctypes.c_void_p) for name in ("x", "order", "starts", "tiles", "out", "slots")),
        *((name, ctypes.c_int) for name in ("rows", "cols", "experts", "share", "first")),
    )


class CombineArgs(ctypes.Structure):
    """CombineArgs of activations.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("partial", "ids", "slots", "tiles", "weights", "out")),
        ("out_token", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("tokens", "used", "cols", "experts", "tile")),
        *((name, ctypes.c_int) for name in ("first", "count", "accumulate")),
    )


@functools.cache
def _module(ggml_type: int, device: int) -> Module:
    with torch.cuda.device(device):
        return Module(kernels.grouped_cubin(ggml_type, architecture(device)))


def supports(*stacks: GpuWeight) -> bool:
    """Block types on sm_80 and up; gate and up of one type."""
    return (
        all(w.format.coded for w in stacks)
        and stacks[0].ggml_type == stacks[1].ggml_type
        and architecture(stacks[0].index) >= 80
    )


def moe(
    gate: GpuWeight,
    up: GpuWeight,
    down: GpuWeight,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor,
    accumulate: bool,
) -> None:
    """As ops.moe, for any number of tokens; the result of a token does not depend on the others."""
    step = max(_HIDDEN // (ids.shape[1] * gate.rows), 64)
    for first in range(0, len(x), step):
        part = slice(first, first + step)
        _piece(gate, up, down, x[part].bfloat16(), ids[part], weights[part], out[part], accumulate)


def _piece(
    gate: GpuWeight,
    up: GpuWeight,
    down: GpuWeight,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    out: torch.Tensor,
    accumulate: bool,
) -> None:
    n, used = ids.shape
    pairs, experts = n * used, gate.matrices
    tile = 32 if pairs <= 24 * experts else 64 if pairs <= 64 * experts else 128
    flat = ids.reshape(-1)
    sorted_ids, order = flat.sort(stable=True)
    bounds = torch.arange(experts + 1, device=x.device, dtype=torch.int32)
    starts = torch.searchsorted(sorted_ids, bounds, out_int32=True)
    tiles = torch.zeros_like(starts)
    torch.cumsum((starts.diff() + (tile - 1)) // tile, 0, dtype=torch.int32, out=tiles[1:])
    order = order.int()
    most = pairs // tile + min(experts, pairs)
    places = (order, starts, tiles, used)

    hidden = x.new_empty((pairs, gate.rows))
    slots = torch.empty_like(order)
    args = _arguments((gate, up), x, hidden, *places)
    args.slots = slots.data_ptr()
    rows = -(-2 * gate.rows // _ROWS)
    _module(gate.ggml_type, gate.index).function(f"gated_{tile}").launch((rows, most), _THREADS, args)

    # Results of pairs wait for their sum, so many tiles at a time. All pairs may have met these experts: most
    # often only the first launches find any.
    window = min(max(_PARTIAL // down.rows // tile, 1), most)
    partial = x.new_empty((window * tile, down.rows), dtype=torch.float32)
    plain = _module(down.ggml_type, down.index).function(f"plain_{tile}")
    combine = activation_module(down.index).function("combine")
    args = _arguments((down,), hidden, partial, *places)
    sums = CombineArgs(
        partial.data_ptr(),
        ids.data_ptr(),
        slots.data_ptr(),
        tiles.data_ptr(),
        weights.data_ptr(),
        out.data_ptr(),
        out.stride(0),
    )
    sums.tokens, sums.used, sums.cols, sums.experts, sums.tile = n, used, down.rows, experts, tile
    sums.accumulate, sums.count = accumulate, window * tile
    for first in range(0, most, window):
        args.first, sums.first = first, first * tile
        plain.launch((-(-down.rows // _ROWS), min(window, most - first)), _THREADS, args)
        launch_over(combine, down.index, n * _THREADS, sums)
        sums.accumulate = 1


def _arguments(
    stacks: tuple[GpuWeight, ...],
    x: torch.Tensor,
    out: torch.Tensor,
    order: torch.Tensor,
    starts: torch.Tensor,
    tiles: torch.Tensor,
    used: int,
) -> GroupedArgs:
    args = GroupedArgs()
    for i, w in enumerate(stacks):
        args.w[i] = w.data.data_ptr()
    first = stacks[0]
    args.matrix_bytes, args.blocks = first.matrix_bytes, first.blocks
    args.x, args.out = x.data_ptr(), out.data_ptr()
    args.order, args.starts, args.tiles = order.data_ptr(), starts.data_ptr(), tiles.data_ptr()
    args.rows, args.cols, args.experts, args.share = first.rows, first.cols, first.matrices, used
    return args
