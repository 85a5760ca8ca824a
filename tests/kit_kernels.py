"""Random weights of every block type for the kernel tests. No torch: they also run under qemu."""

from __future__ import annotations

import gguf
import numpy as np
from numpy.typing import NDArray

from ktd_kernels import Weight

F32 = NDArray[np.float32]

#: Every tensor type that has kernels.
FLOAT_TYPES = ["F32", "F16", "BF16"]
TYPES_32 = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "MXFP4"]
TYPES_256 = [
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"),
    *("IQ3_XXS", "IQ3_S", "IQ4_XS", "TQ1_0", "TQ2_0"),
]
QUANTIZED_TYPES = [*TYPES_32, *TYPES_256]
ALL_TYPES = [*FLOAT_TYPES, *QUANTIZED_TYPES]

#: Byte offsets of the f16 fields of a block.
_HALVES = {
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **dict.fromkeys(
        ("Q4_0", "Q5_0", "Q8_0", "IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,)
    ),
    **dict.fromkeys(("IQ4_NL", "IQ4_XS"), (0,)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
}


def type_id(name: str) -> int:
    return int(gguf.GGMLQuantizationType[name])


def block_size(name: str) -> int:
    """Values per block."""
    return int(gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][0])


def blocks(
    name: str, rows: int, cols: int, seed: int = 0, scale: float | None = 1.0, fill: int | None = None
) -> NDArray[np.uint8]:
    """uint8 [rows, bytes of a row]: random codes, block scales in [-scale, scale]; None = any finite half.

    With `fill` every byte but the block scales is that.
    """
    rng = np.random.default_rng([seed, type_id(name)])
    if name in FLOAT_TYPES:
        values = rng.standard_normal((rows, cols), np.float32)
        if name == "F16":
            return values.astype(np.float16).view(np.uint8)
        if name == "BF16":
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return values.view(np.uint8)
    size, width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    out = rng.integers(0, 256, (rows, cols // size * width), dtype=np.uint8)
    if fill is not None:
        out[:] = fill
    block = out.reshape(-1, width)
    for at in _HALVES.get(name, ()):
        block[:, at : at + 2] = _halves(rng, len(block), scale).view(np.uint8).reshape(-1, 2)
    if name == "IQ1_M":  # the half is spread over the top nibbles of four words
        bits = _halves(rng, len(block), scale).view(np.uint16)
        words = block[:, 48:56].copy().view(np.uint16) & 0x0FFF
        words |= np.stack([(bits >> 4 * i & 15) << 12 for i in range(4)], axis=1).astype(np.uint16)
        block[:, 48:56] = words.view(np.uint8)
    if name == "MXFP4" and scale is not None:
        block[:, 0] = rng.integers(110, 126, len(block))
    return out


def _halves(rng: np.random.Generator, count: int, scale: float | None) -> NDArray[np.float16]:
    if scale is not None:
        return rng.uniform(-scale, scale, count).astype(np.float16)
    bits = rng.integers(0, 1 << 16, count, dtype=np.uint16)
    bits[(bits & 0x7C00) == 0x7C00] ^= 0x4000
    extremes = np.array([0, 0x8000, 1, 0x8001, 0x03FF, 0x0400, 0x7BFF, 0xFBFF], np.uint16)
    bits[: len(extremes)] = extremes[:count]
    return bits.view(np.float16)


def weight(name: str, *shape: int, seed: int = 0) -> Weight:
    """A Weight of shape [rows, cols] or [count, rows, cols]."""
    return Weight(blocks(name, int(np.prod(shape[:-1])), shape[-1], seed).ravel(), type_id(name), list(shape))


def normal(seed: int, *shape: int) -> F32:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)
