"""Weights of every block type on a CUDA device, and what int8 activations make of a product."""

from __future__ import annotations

import gguf
import numpy as np
import torch
from kit_kernels import F32, block_size, blocks, type_id
from numpy.typing import NDArray

from ktd_kernels.cuda import GpuWeight

U = 2.0**-24  # rounding error of one float32 operation, relative


def gpu_weight(name: str, *shape: int, seed: int = 0) -> tuple[GpuWeight, F32]:
    """A weight of shape [rows, cols] or [count, rows, cols], and its values from the oracle."""
    data = blocks(name, int(np.prod(shape[:-1])), shape[-1], seed)
    values = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name]).astype(np.float32)
    return GpuWeight(torch.from_numpy(data.ravel()).cuda(), type_id(name), shape), values.reshape(shape)


def quantized(x: F32, block: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What int8 with one scale per block makes of x, and the largest error of each value."""
    parts = x.astype(np.float64).reshape(*x.shape[:-1], -1, block)
    scale = np.abs(parts).max(axis=-1, keepdims=True) / 127
    codes = np.rint(np.divide(parts, scale, out=np.zeros_like(parts), where=scale > 0))
    return (codes * scale).reshape(x.shape), np.broadcast_to(scale / 2, parts.shape).reshape(x.shape)


def rounding_bound(name: str, values: F32, x: F32) -> NDArray[np.float64]:
    """Most that float32 roundings move a product of a block type: values [rows, cols], x [n, cols]."""
    exact, cols, size = values.astype(np.float64), values.shape[1], block_size(name)
    # Per 32 values and for scale and minimum: a product, a sum. A weight's parts are no larger than thrice
    # the largest weight of its block.
    blocked = np.abs(exact).reshape(len(exact), -1, size).max(axis=-1, keepdims=True)
    parts = 3 * blocked.repeat(size, axis=-1).reshape(exact.shape)
    bound: NDArray[np.float64] = (4 * cols / 32 + 10) * U * (np.abs(quantized(x, size)[0]) @ parts.T)
    return bound


def product_bound(name: str, values: F32, x: F32) -> NDArray[np.float64]:
    """Largest |result - float64 product with x| of up to 64 tokens: values [rows, cols], x [n, cols]."""
    exact, cols = values.astype(np.float64), values.shape[1]
    size = block_size(name)
    if size == 1:  # at least four running sums of a quarter of the values, then their sum
        return (cols / 4 + 8) * U * (np.abs(x.astype(np.float64)) @ np.abs(exact).T)
    # An activation moves by at most half a step; float division may turn a tie.
    moved = (quantized(x, size)[1] * (1 + 1e-5)) @ np.abs(exact).T
    return moved + rounding_bound(name, values, x)
