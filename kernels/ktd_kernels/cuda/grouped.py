"""Experts for many tokens: pairs of token and expert sorted by expert, weights decoded into tensor cores.

Pairs are sorted once for all experts, which may then come in groups. For each group one launch for gate, up
and SwiGLU, one for down, one for the weighted sum (src/grouped.cu).
"""

from __future__ import annotations

import ctypes
import functools
from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import torch

from ktd_kernels.cuda import kernels
from ktd_kernels.cuda.driver import Function, Module
from ktd_kernels.cuda.product import activation_module
from ktd_kernels.cuda.weight import GpuWeight, architecture, launch_over

_THREADS, _ROWS = 256, 128  # kThreads and kRows of grouped.cu
_PLACES = 3  # on sm_90: what shared memory has room for, see multiply_tile in grouped.cu
_HIDDEN = 1 << 24  # bfloat16 values between up and down that are kept at a time
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
        *((name, ctypes.c_int) for name in ("rows", "cols", "experts", "share", "first", "base", "expert")),
    )


class CombineArgs(ctypes.Structure):
    """CombineArgs of activations.cu."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("partial", "slots", "weights", "out")),
        ("out_token", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("tokens", "used", "cols", "first", "count")),
    )


@functools.cache
def _module(ggml_type: int, device: int) -> Module:
    with torch.cuda.device(device):
        return Module(kernels.grouped_cubin(ggml_type, architecture(device)))


@functools.cache
def _function(name: str, tile: int, ggml_type: int, device: int) -> tuple[Function, int]:
    """A kernel and the dynamic shared memory it takes."""
    function = _module(ggml_type, device).function(f"{name}_{tile}")
    shared = _PLACES * (_ROWS + tile) * 128 + 1024 if architecture(device) == 90 else 0
    if shared:
        function.allow_shared(shared)
    return function, shared


def supports(*stacks: GpuWeight) -> bool:
    """Block types on sm_80 and up; gate and up of one type."""
    return (
        all(w.format.coded for w in stacks)
        and stacks[0].ggml_type == stacks[1].ggml_type
        and architecture(stacks[0].index) >= 80
    )


class OnHost:
    """Integers of a device on their way to the host. Their page-locked memory, which takes milliseconds to
    come by, is used again once they were read."""

    _free: ClassVar[dict[int, list[torch.Tensor]]] = defaultdict(list)

    def __init__(self, values: torch.Tensor) -> None:
        """values int32 [n]; copied on the current stream."""
        free = self._free[len(values)]
        self._room = free.pop() if free else torch.empty(len(values), dtype=torch.int32, pin_memory=True)
        self._room.copy_(values, non_blocking=True)
        self._arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        self._arrived.record()
        self._read: list[int] | None = None

    def read(self) -> list[int]:
        """Waits for them."""
        if self._read is None:
            self._arrived.synchronize()
            self._read = self._room.tolist()
            self._free[len(self._read)].append(self._room)
        return self._read


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs of token and expert sorted by expert, in tiles of up to `tile` pairs of one expert.

    x float32 [n, cols], ids int32 [n, used] and weights float32 [n, used] as of ops.moe, for `experts`
    experts; rounded: x as bfloat16; order int32 [pairs]: the pairs by expert, those of none first; starts and
    tiles int32 [experts + 1]: where an expert's pairs and tiles begin; slots int32 [pairs]: where a pair
    stands in the tiles once its expert was computed, before that negative.
    """

    x: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    experts: int
    tile: int
    rounded: torch.Tensor
    order: torch.Tensor
    starts: torch.Tensor
    tiles: torch.Tensor
    slots: torch.Tensor
    tiles_on_host: OnHost

    @classmethod
    def of(cls, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, experts: int) -> Pairs:
        """Sorts on the current stream; nothing is awaited."""
        n, used = ids.shape
        tile = 32 if n * used <= 24 * experts else 64 if n * used <= 64 * experts else 128
        sorted_ids, order = ids.reshape(-1).sort(stable=True)
        bounds = torch.arange(experts + 1, device=x.device, dtype=torch.int32)
        starts = torch.searchsorted(sorted_ids, bounds, out_int32=True)
        tiles = torch.zeros_like(starts)
        torch.cumsum((starts.diff() + (tile - 1)) // tile, 0, dtype=torch.int32, out=tiles[1:])
        order = order.int()
        return cls(
            x,
            ids,
            weights,
            experts,
            tile,
            x.bfloat16(),
            order,
            starts,
            tiles,
            torch.full_like(order, -1),
            OnHost(tiles),
        )


def add(gate: GpuWeight, up: GpuWeight, down: GpuWeight, pairs: Pairs, first: int, out: torch.Tensor) -> None:
    """Adds to out [n, cols] what tokens get of the experts from `first` on that these stacks hold. Those
    before them must have been added: every token's sum has one order."""
    tiles = pairs.tiles_on_host.read()
    end = tiles[first + gate.matrices]
    for base in range(tiles[first], end, step := max(_HIDDEN // gate.rows // pairs.tile, 1)):
        _tiles(gate, up, down, pairs, first, range(base, min(base + step, end)), out)


def _tiles(
    gate: GpuWeight,
    up: GpuWeight,
    down: GpuWeight,
    pairs: Pairs,
    first: int,
    tiles: range,
    out: torch.Tensor,
) -> None:
    x, tile = pairs.rounded, pairs.tile
    hidden = x.new_empty((len(tiles) * tile, gate.rows))
    args = _arguments((gate, up), pairs, first, tiles.start, x, hidden)
    rows = -(-2 * gate.rows // _ROWS)
    gated, shared = _function("gated", tile, gate.ggml_type, gate.index)
    gated.launch((rows, len(tiles)), _THREADS, args, shared=shared)

    # Results of pairs wait for their sum, so many tiles at a time.
    window = max(_PARTIAL // down.rows // tile, 1)
    partial = x.new_empty((min(window, len(tiles)) * tile, down.rows), dtype=torch.float32)
    plain, shared = _function("plain", tile, down.ggml_type, down.index)
    combine = activation_module(down.index).function("combine")
    args = _arguments((down,), pairs, first, tiles.start, hidden, partial)
    n, used = pairs.ids.shape
    sums = CombineArgs(
        partial.data_ptr(), pairs.slots.data_ptr(), pairs.weights.data_ptr(), out.data_ptr(), out.stride(0)
    )
    sums.tokens, sums.used, sums.cols = n, used, down.rows
    for start in range(tiles.start, tiles.stop, window):
        count = min(window, tiles.stop - start)
        args.first, sums.first, sums.count = start, start * tile, count * tile
        plain.launch((-(-down.rows // _ROWS), count), _THREADS, args, shared=shared)
        launch_over(combine, down.index, n * _THREADS, sums)


def _arguments(
    stacks: tuple[GpuWeight, ...], pairs: Pairs, expert: int, tile: int, x: torch.Tensor, out: torch.Tensor
) -> GroupedArgs:
    args = GroupedArgs()
    for i, w in enumerate(stacks):
        args.w[i] = w.data.data_ptr()
    weight = stacks[0]
    args.matrix_bytes, args.blocks = weight.matrix_bytes, weight.blocks
    args.x, args.out, args.order = x.data_ptr(), out.data_ptr(), pairs.order.data_ptr()
    args.starts, args.tiles, args.slots = (t.data_ptr() for t in (pairs.starts, pairs.tiles, pairs.slots))
    args.rows, args.cols, args.experts = weight.rows, weight.cols, pairs.experts
    args.share = pairs.ids.shape[1]
    args.first = args.base = tile
    args.expert = expert
    return args
