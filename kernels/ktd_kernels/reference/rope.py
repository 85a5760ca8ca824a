"""Rotary embedding on interleaved pairs, and the YaRN table (Peng et al. 2023, arXiv 2309.00071)."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def rope(
    x: NDArray[np.float32], positions: NDArray[np.int32], table: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Rotate pair (2i, 2i+1) of x [n, H, dr] by the angle of row positions[n] in table [max_pos, dr].

    A table row holds cos, sin of frequency 0, cos, sin of frequency 1, …
    """
    cos = table[positions, 0::2].astype(np.float64)[:, None, :]
    sin = table[positions, 1::2].astype(np.float64)[:, None, :]
    even, odd = x[..., 0::2].astype(np.float64), x[..., 1::2].astype(np.float64)
    out = np.empty(x.shape, np.float64)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out


def yarn_frequencies(
    dim: int, base: float, factor: float, original_context: int, beta_fast: float, beta_slow: float
) -> NDArray[np.float64]:
    """Angle per position of each of the dim/2 pairs.

    YaRN blends f and f / factor with a linear ramp between the correction dimensions of beta_fast and
    beta_slow, as HF's DeepSeek code does; factor 1 leaves plain rotary frequencies.
    """
    frequency = base ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    if factor == 1.0:
        return frequency

    def correction(beta: float) -> float:
        return dim * math.log(original_context / (beta * 2.0 * math.pi)) / (2.0 * math.log(base))

    low = max(math.floor(correction(beta_fast)), 0)
    high = min(math.ceil(correction(beta_slow)), dim - 1)
    width = high - low if high != low else 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float64) - low) / width, 0.0, 1.0)
    return frequency * (1.0 - ramp) + frequency / factor * ramp


def yarn_table(
    positions: int,
    dim: int,
    base: float = 10000.0,
    factor: float = 1.0,
    original_context: int = 4096,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    magnitude: float = 1.0,
) -> NDArray[np.float32]:
    """The table for `rope`, [positions, dim], cos and sin times `magnitude` (1 for every DeepSeek model)."""
    frequency = yarn_frequencies(dim, base, factor, original_context, beta_fast, beta_slow)
    angle = np.arange(positions, dtype=np.float64)[:, None] * frequency
    table = np.empty((positions, dim), np.float32)
    table[:, 0::2] = np.cos(angle) * magnitude
    table[:, 1::2] = np.sin(angle) * magnitude
    return table


def yarn_attention_scale(head_dim: int, factor: float, mscale_all_dim: float) -> float:
    """Softmax scale head_dim^-0.5 · m², m = 0.1 · mscale_all_dim · ln(factor) + 1 (R1: 0.135234)."""
    m = 0.1 * mscale_all_dim * math.log(factor) + 1.0 if factor > 1.0 else 1.0
    return float(head_dim**-0.5 * m * m)
