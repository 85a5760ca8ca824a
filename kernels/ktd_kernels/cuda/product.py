"""Launches of the products straight from the blocks (see src/product.cuh) and of what feeds them.

Activations are quantised to int8 per block exactly as on the CPU, so sums inside a block are exact integers
and only the order in which blocks are added differs. A token's result does not depend on its company.
"""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass

import torch

from ktd_kernels.cuda import kernels
from ktd_kernels.cuda.driver import Module
from ktd_kernels.cuda.scratch import scratch
from ktd_kernels.cuda.weight import GpuWeight, architecture, launch_over, processors, product_module

_THREADS = 256  # kThreads of product.cuh
_HALVES = 28  # half warps of a thread block of experts.cu, at most


class ProductArgs(ctypes.Structure):
    """ProductArgs of product.cuh."""

    _fields_ = (
        ("w", ctypes.c_void_p * 2),
        ("matrix_bytes", ctypes.c_uint64),
        ("blocks", ctypes.c_uint64),
        ("q", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("x_slot", ctypes.c_int64),
        ("x_token", ctypes.c_int64),
        ("ids", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_stack", ctypes.c_int64),
        ("out_slot", ctypes.c_int64),
        ("out_token", ctypes.c_int64),
        *((name, ctypes.c_int) for name in ("rows", "cols", "slots", "terms", "tokens", "matrices")),
        *((name, ctypes.c_int) for name in ("stacks", "share", "lanes", "term_warps", "accumulate")),
    )


class ActivationArgs(ctypes.Structure):
    """ActivationArgs of activations.cu."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("up", ctypes.c_void_p),
        ("x_slot", ctypes.c_int64),
        ("x_token", ctypes.c_int64),
        ("q", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("slots", ctypes.c_int),
        ("tokens", ctypes.c_int),
        ("cols", ctypes.c_int),
    )


@dataclass(frozen=True)
class Activations:
    """What a product reads: int8 rows with scales and sums, or floats as they are."""

    q: torch.Tensor | None
    scales: torch.Tensor | None
    sums: torch.Tensor | None
    x: torch.Tensor | None
    x_slot: int
    x_token: int


@functools.cache
def activation_module(device: int) -> Module:
    """Quantisation, SwiGLU and weighted sums on a device."""
    with torch.cuda.device(device):
        return Module(kernels.activation_cubin(architecture(device)))


def activations(
    w: GpuWeight, x: torch.Tensor, up: torch.Tensor | None = None, name: str = "x"
) -> Activations:
    """x [slots, tokens, cols] as products with w take it; with `up`, silu(x) · up of it.

    `name` keeps apart the scratch of two activations that live at the same time.
    """
    slots, tokens, cols = x.shape
    x = _aligned(x)
    coded = w.format.coded
    if not coded and up is None:
        return Activations(None, None, None, x, x.stride(0), x.stride(1))
    args = ActivationArgs(x=x.data_ptr(), up=up.data_ptr() if up is not None else None)
    args.x_slot, args.x_token = x.stride(0), x.stride(1)
    args.slots, args.tokens, args.cols = slots, tokens, cols
    rows = slots * tokens
    if coded:
        q = scratch(f"{name}.q", (rows, cols), torch.int8, x.device)
        scales = scratch(f"{name}.scales", (rows, cols // w.format.block), torch.float32, x.device)
        sums = scratch(f"{name}.sums", (rows, cols // 32), torch.int32, x.device)
        args.q, args.scales, args.sums = q.data_ptr(), scales.data_ptr(), sums.data_ptr()
        result = Activations(q, scales, sums, None, 0, 0)
    else:
        out = scratch(f"{name}.floats", (slots, tokens, cols), torch.float32, x.device)
        args.out = out.data_ptr()
        result = Activations(None, None, None, out, out.stride(0), out.stride(1))
    kernel = activation_module(w.index).function("quantize_32" if w.format.block == 32 else "quantize_256")
    launch_over(kernel, w.index, rows * -(-cols // 256) * 32, args)
    return result


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x itself where its rows start at multiples of 16 bytes, as the kernels read them; else a copy."""
    rows = x.data_ptr() % 16 == 0 and x.stride(0) % 4 == 0 and x.stride(1) % 4 == 0
    return x if rows else x.clone(memory_format=torch.contiguous_format)


def _cut(w: GpuWeight, lanes: int, tile: int, others: int) -> tuple[str, int]:
    """The kernel for `tile` tokens and how many tiles of rows there are for its thread blocks, `others` for
    each tile of a matrix. Which kernel it is changes no bits."""
    rows = 1 if not w.format.coded else 4 if tile == 1 else 2
    tiles = -(-w.rows // (_THREADS // lanes * rows)) * others
    if tile >= 4 and w.format.coded and architecture(w.index) >= 80:
        fewer = -(-w.rows // (_THREADS // min(lanes, 32) * (2 if tile == 8 else 4))) * others
        if fewer >= processors(w.index):
            return f"several_{tile}", fewer
    return f"product_{tile}", tiles


def lanes_per_row(w: GpuWeight) -> int:
    """Threads that share a row: a choice by the matrix alone, so that the order of adding is fixed."""
    pieces = w.cols // 32 if w.format.coded else w.cols // 4
    lanes = 4
    while lanes < 32 and pieces % (2 * lanes) == 0:
        lanes *= 2
    if lanes < 32 and pieces > 4 * lanes:
        lanes = 32
    rows, wanted = w.rows * min(w.matrices, 8), processors(w.index) * 1024
    while 32 <= lanes < _THREADS and rows * lanes < wanted and pieces >= 2 * lanes:
        lanes *= 2
    return lanes


@functools.cache
def _experts_module(ggml_type: int, cols: int, terms: int, device: int) -> Module:
    with torch.cuda.device(device):
        return Module(kernels.experts_cubin(ggml_type, cols, terms, _HALVES, architecture(device)))


def _in_columns(w: GpuWeight, terms: int) -> bool:
    """Whether experts.cu takes a stack: a choice by the matrix and the experts of a token."""
    fits = w.format.coded and w.cols % 1024 == 0 and w.rows % 4 == 0
    halves = w.cols // 1024 * terms
    return fits and halves * (1 + halves % 2) <= _HALVES


def product(
    w: tuple[GpuWeight, ...],
    x: Activations,
    out: torch.Tensor,
    *,
    slots: int,
    tokens: int,
    terms: int = 1,
    ids: torch.Tensor | None = None,
    share: int = 1,
    weights: torch.Tensor | None = None,
    accumulate: bool = False,
) -> None:
    """One launch of product.cuh; out [stacks, slots, tokens, rows], the last dimension contiguous."""
    first = w[0]
    args = ProductArgs()
    for i, stack in enumerate(w):
        args.w[i] = stack.data.data_ptr()
    args.matrix_bytes, args.blocks = first.matrix_bytes, first.blocks
    if x.q is not None and x.scales is not None and x.sums is not None:
        args.q, args.scales, args.sums = x.q.data_ptr(), x.scales.data_ptr(), x.sums.data_ptr()
    if x.x is not None:
        args.x, args.x_slot, args.x_token = x.x.data_ptr(), x.x_slot, x.x_token
    args.ids = ids.data_ptr() if ids is not None else None
    args.weights = weights.data_ptr() if weights is not None else None
    args.out = out.data_ptr()
    args.out_stack, args.out_slot, args.out_token = out.stride(0), out.stride(1), out.stride(2)
    args.rows, args.cols, args.matrices = first.rows, first.cols, first.matrices
    args.slots, args.terms, args.tokens, args.stacks = slots, terms, tokens, len(w)
    args.share, args.accumulate = share, accumulate
    if ids is not None and tokens == 1 and _in_columns(first, terms):
        halves = first.cols // 1024 * terms
        step = 1 + halves % 2
        threads = 16 * halves * (_HALVES // halves // step * step)
        module = _experts_module(first.ggml_type, first.cols, terms, first.index)
        kernel = module.function("product_experts")
        kernel.launch((processors(first.index) * kernel.resident(threads), 1), threads, args)
        return
    args.term_warps = math.gcd(terms, _THREADS // 32)
    args.lanes = 32 * args.term_warps if args.term_warps > 1 else lanes_per_row(first)
    tile = 1 if tokens == 1 else 2 if tokens == 2 else 4 if tokens <= 4 else 8
    name, items = _cut(first, args.lanes, tile, -(-tokens // tile) * slots * len(w))
    kernel = product_module(first.ggml_type, first.index).function(name)
    rounds = -(-items // (processors(first.index) * kernel.resident(_THREADS)))
    blocks = -(-items // rounds)  # all of them do the same number
    kernel.launch((blocks, 1), _THREADS, args)
