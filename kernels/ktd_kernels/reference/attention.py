"""The paged latent cache and absorbed multi-head latent attention over it (DeepSeek-V2, arXiv 2405.04434)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def to_bf16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """float32 → bfloat16 bits, rounded to nearest, ties to even; NaN becomes a quiet NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    quiet = ((bits >> 16) | 0x40).astype(np.uint16)
    return np.where(np.isnan(x), quiet, rounded)


def from_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 bits → float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def store_latent(
    latent: NDArray[np.float32], slots: NDArray[np.int64], cache: NDArray[np.float32] | NDArray[np.uint16]
) -> None:
    """Write latent [n, w] to cache [pages, page_size, w], in place; slot = page · page_size + offset."""
    page_size = cache.shape[1]
    for row, slot in zip(latent, slots, strict=True):
        values = to_bf16(row) if cache.dtype == np.uint16 else row
        cache[slot // page_size, slot % page_size] = values


def mla_attention(
    q_latent: NDArray[np.float32],
    q_rope: NDArray[np.float32],
    cache: NDArray[np.float32] | NDArray[np.uint16],
    page_table: NDArray[np.int32],
    seq_of_row: NDArray[np.int32],
    context: NDArray[np.int32],
    scale: float,
) -> NDArray[np.float64]:
    """softmax(scale · (q_latent · c + q_rope · k_rope)) · c over row i's first context[i] tokens.

    q_latent [n, H, r], q_rope [n, H, dr], cache [pages, page_size, r + dr] float32 or bfloat16 bits,
    page_table [sequences, max_pages], seq_of_row and context [n] → [n, H, r]. Row i belongs to sequence
    seq_of_row[i]; a row with context 0 gives zeros.
    """
    n, heads, r = q_latent.shape
    page_size = cache.shape[1]
    out = np.zeros((n, heads, r), np.float64)
    for i in range(n):
        tokens = np.arange(context[i])
        if not tokens.size:
            continue
        pages = page_table[seq_of_row[i], tokens // page_size]
        stored = cache[pages, tokens % page_size]
        keys = (from_bf16(stored) if stored.dtype == np.uint16 else stored).astype(np.float64)
        query = np.concatenate([q_latent[i], q_rope[i]], axis=-1).astype(np.float64)
        scores = scale * (query @ keys.T)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        out[i] = weights @ keys[:, :r]
    return out
