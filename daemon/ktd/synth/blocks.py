"""Random weights as GGUF block bytes, at a wanted standard deviation."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Q
from gguf.quants import dequantize
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

# Byte offset of the f16 scale in a block, and of the f16 minimum where there is one. Everything else in
# a block may be any byte. IQ1_M keeps its scale in four nibbles, MXFP4 in an exponent byte.
_SCALE_AT = {
    Q.Q4_0: 0, Q.Q4_1: 0, Q.Q5_0: 0, Q.Q5_1: 0, Q.Q8_0: 0, Q.IQ4_NL: 0,
    Q.Q2_K: 80, Q.Q3_K: 108, Q.Q4_K: 0, Q.Q5_K: 0, Q.Q6_K: 208,
    Q.IQ1_S: 0, Q.IQ2_XXS: 0, Q.IQ2_XS: 0, Q.IQ2_S: 0, Q.IQ3_XXS: 0, Q.IQ3_S: 0, Q.IQ4_XS: 0,
    Q.TQ1_0: 52, Q.TQ2_0: 64,
}  # fmt: skip
_MINIMUM_AT = {Q.Q4_1: 2, Q.Q5_1: 2, Q.Q2_K: 82, Q.Q4_K: 2, Q.Q5_K: 2}
_FLOATS = (Q.F32, Q.F16, Q.BF16)
_CALIBRATION_BLOCKS = 4096


@dataclass(frozen=True, slots=True)
class _Unit:
    """Root mean square at scale 1, and the minimum per scale that makes the mean zero."""

    deviation: float
    minimum: float


def _set_f16(blocks: Bytes, offset: int, values: NDArray[np.float16]) -> None:
    blocks[:, offset : offset + 2] = values.reshape(-1, 1).view(np.uint8)


def _set_scale(kind: Q, blocks: Bytes, scale: NDArray[np.float64], minimum: float) -> None:
    """Give each block its scale (and scale · minimum where the type has one)."""
    if kind is Q.MXFP4:
        # e8m0: the block's values are multiples of 2^(e - 128).
        blocks[:, 0] = np.clip(np.rint(np.log2(np.abs(scale))) + 128, 1, 254)
    elif kind is Q.IQ1_M:
        # The f16 bits lie in the top nibbles of the four little-endian u16 at offset 48, lowest nibble first.
        bits = scale.astype(np.float16).view(np.uint16)
        for nibble in range(4):
            low = blocks[:, 49 + 2 * nibble] & 0x0F
            blocks[:, 49 + 2 * nibble] = low | (((bits >> (4 * nibble)) & 15) << 4).astype(np.uint8)
    else:
        if kind is Q.TQ2_0:
            # Two bits for three values: files never hold the fourth, 3 becomes 2.
            blocks[:, :64] &= ~(blocks[:, :64] & (blocks[:, :64] >> 1) & 0x55)
        _set_f16(blocks, _SCALE_AT[kind], scale.astype(np.float16))
        if kind in _MINIMUM_AT:
            _set_f16(blocks, _MINIMUM_AT[kind], (scale * minimum).astype(np.float16))


@functools.cache
def _calibrate(kind: Q) -> _Unit:
    """Measure the spread of random blocks of one type at scale 1."""
    size = GGML_QUANT_SIZES[kind][1]
    blocks = np.random.default_rng(0).integers(0, 256, (_CALIBRATION_BLOCKS, size), np.uint8)
    ones = np.ones(_CALIBRATION_BLOCKS)
    _set_scale(kind, blocks, ones, 0.0)
    values = dequantize(blocks, kind)
    if kind not in _MINIMUM_AT:
        return _Unit(float(np.sqrt(np.mean(values**2))), 0.0)
    mean = float(values.mean())
    _set_scale(kind, blocks, ones, 1.0)
    minimum = mean / (mean - float(dequantize(blocks, kind).mean()))
    _set_scale(kind, blocks, ones, minimum)
    return _Unit(float(dequantize(blocks, kind).std()), minimum)


def random_bytes(
    kind: Q, values: int, deviation: float, rng: np.random.Generator, mean: float = 0.0
) -> Bytes:
    """`values` random weights (whole blocks) of standard deviation `deviation`, as bytes.

    Block scales vary by ±25 % and carry random signs, so that every type has mean zero. `mean` applies to
    float types only.
    """
    if kind in _FLOATS:
        floats = rng.standard_normal(values, np.float32) * np.float32(deviation) + np.float32(mean)
        if kind is Q.F32:
            return floats.view(np.uint8)
        if kind is Q.F16:
            return floats.astype(np.float16).view(np.uint8)
        return (floats.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    per_block, size = GGML_QUANT_SIZES[kind]
    count = values // per_block
    raw = rng.integers(0, 1 << 64, -(-count * size // 8), np.uint64)
    blocks = raw.view(np.uint8)[: count * size].reshape(count, size)
    unit = _calibrate(kind)
    spread = rng.random(count, np.float32) * 0.5 + 0.75
    sign = np.where(rng.random(count, np.float32) < 0.5, -1.0, 1.0)
    scale = (deviation / unit.deviation * spread * sign).astype(np.float64)
    _set_scale(kind, blocks, scale, unit.minimum)
    return blocks.reshape(-1)
