"""Experts that stay in the host's memory and are computed on the device: it reads those that a row has chosen
over the bus itself, while the CPU computes others. The CPU's kernels for low-bit types are bound by
arithmetic, so that the memory has bandwidth left."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch

from ktd_kernels import Weight
from ktd_kernels.cuda import kernels, ops
from ktd_kernels.cuda.driver import Module
from ktd_kernels.cuda.packed import unpack
from ktd_kernels.cuda.weight import GpuWeight, architecture

_THREADS = 256
# Blocks of a launch, whatever it fetches: each has 32 KiB on their way, and a fourth of them fill the bus.
_BLOCKS = 32
_ALIGNMENT = 256


class FetchArgs(ctypes.Structure):
    """FetchArgs of fetch.cu."""

    _fields_ = (
        ("source", ctypes.c_void_p * 3),
        ("target", ctypes.c_void_p * 3),
        ("each", ctypes.c_uint32 * 3),
        *((name, ctypes.c_void_p) for name in ("ids", "weights", "numbers", "chosen")),
        *((name, ctypes.c_int) for name in ("used", "first")),
        ("experts", ctypes.c_uint32),
    )


class FetchedExperts:
    """Stacks gate, up [experts, f, d] and down [experts, d, f] in packed layouts and page-locked memory of
    the host, of which a few experts at a time pass through `room`, uint8 on the device."""

    def __init__(self, stacks: Sequence[Weight], room: torch.Tensor) -> None:
        self._stacks, self._room = stacks, room
        if any(stack.nbytes // stack.shape[0] % 16 for stack in stacks):
            raise ValueError("experts must be multiples of 16 bytes")
        each = sum(stack.nbytes // stack.shape[0] for stack in stacks)
        planes = sum(_planes(stack, 1, room).matrix_bytes for stack in stacks)
        #: How many experts.
        self.slots = max((room.numel() - 8 * _ALIGNMENT) // (each + planes + 8), 0)

    def add(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, first: int, out: torch.Tensor
    ) -> None:
        """Adds to out[n] what x[n] gets of its experts ids[n, first:], times weights[n, first:], in their
        order. An id outside 0 … experts - 1 adds nothing.

        x float32 [n, d], ids int32 [n, k], weights float32 [n, k], out float32 [n, d], all contiguous;
        k - first is at most `slots`. May be captured after a first call of the same shape. A row has the same
        bits whatever shares the call.
        """
        at_once = self.slots // (ids.shape[1] - first)
        if not at_once:
            raise ValueError(f"there is room for {self.slots} experts, not for {ids.shape[1] - first}")
        for start in range(0, len(x), at_once):
            rows = slice(start, start + at_once)
            self._add_at_once(x[rows], ids[rows], weights[rows], first, out[rows])

    def _add_at_once(
        self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, first: int, out: torch.Tensor
    ) -> None:
        n, used = ids.shape
        pairs = n * (used - first)
        room = self._room

        def take(nbytes: int) -> torch.Tensor:
            nonlocal room
            part, room = room[:nbytes], room[-(-nbytes // _ALIGNMENT) * _ALIGNMENT :]
            return part

        numbers, chosen = take(4 * pairs).view(torch.int32), take(4 * pairs).view(torch.float32)
        arguments = FetchArgs(
            ids=ids.data_ptr(),
            weights=weights.data_ptr(),
            numbers=numbers.data_ptr(),
            chosen=chosen.data_ptr(),
            used=used,
            first=first,
            experts=self._stacks[0].shape[0],
        )
        packed = []
        for i, stack in enumerate(self._stacks):
            each = stack.nbytes // stack.shape[0]
            packed.append(take(pairs * each))
            arguments.source[i], arguments.target[i] = stack.bytes.ctypes.data, packed[i].data_ptr()
            arguments.each[i] = each // 16
        fetch = _module(x.device.index).function("fetch")
        fetch.launch((max(_BLOCKS // pairs, 1), pairs), _THREADS, arguments)
        there = []
        for stack, data in zip(self._stacks, packed, strict=True):
            planes = _planes(stack, pairs, room)
            take(planes.nbytes)
            unpack(data, stack.layout, planes)
            there.append(planes)
        gate, up, down = there
        ops.moe(gate, up, down, x, numbers.view(n, -1), chosen.view(n, -1), out, accumulate=True)


def _planes(stack: Weight, count: int, room: torch.Tensor) -> GpuWeight:
    """`count` matrices of a stack where `room` begins."""
    return GpuWeight.empty(stack.ggml_type, (count, *stack.shape[1:]), room.device, room)


@functools.cache
def _module(device: int) -> Module:
    with torch.cuda.device(device):
        return Module(kernels.fetch_cubin(architecture(device)))
