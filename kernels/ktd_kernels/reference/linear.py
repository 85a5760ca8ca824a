"""Products with dequantised weights: linear, per-head, gated MLP, mixture of experts, embedding."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as gguf_dequantize
from numpy.typing import NDArray

F64 = NDArray[np.float64]
F32 = NDArray[np.float32]


def dequantize(data: NDArray[np.uint8], ggml_type: int, shape: tuple[int, ...]) -> F32:
    """The float32 values of GGUF blocks `data` (1-D bytes), in `shape` (row length last)."""
    rows = data.reshape(int(np.prod(shape[:-1])), -1)
    return (
        gguf_dequantize(rows, GGMLQuantizationType(ggml_type)).astype(np.float32, copy=False).reshape(shape)
    )


def silu(x: F64) -> F64:
    """x · sigmoid(x)."""
    return x / (1.0 + np.exp(-x))


def linear(w: F32, x: F32) -> F64:
    """x[n, cols] @ w[rows, cols].T → [n, rows]."""
    return x.astype(np.float64) @ w.astype(np.float64).T


def linear_heads(w: F32, x: F32) -> F64:
    """One matrix a head: w[H, rows, cols], x[n, H, cols] → [n, H, rows]."""
    product: F64 = np.einsum("hrc,nhc->nhr", w.astype(np.float64), x.astype(np.float64))
    return product


def mlp(gate: F32, up: F32, down: F32, x: F32) -> F64:
    """down(silu(gate x) * (up x)): gate and up [f, d], down [d, f], x [n, d] → [n, d]."""
    hidden = silu(linear(gate, x)) * linear(up, x)
    return hidden @ down.astype(np.float64).T


def moe(gate: F32, up: F32, down: F32, x: F32, ids: NDArray[np.int32], weights: F32) -> F64:
    """Weighted sum of the chosen experts' MLPs.

    gate and up [E, f, d], down [E, d, f], x [n, d], ids and weights [n, k] → [n, d]. The experts of a token
    are added in the order of its row of `ids`.
    """
    out = np.zeros((x.shape[0], down.shape[1]), np.float64)
    for row in range(x.shape[0]):
        for expert, weight in zip(ids[row], weights[row], strict=True):
            out[row] += float(weight) * mlp(gate[expert], up[expert], down[expert], x[row : row + 1])[0]
    return out


def embed(w: F32, ids: NDArray[np.int32]) -> F32:
    """Rows `ids` [n] of the embedding w [vocab, d] → [n, d]."""
    return w[ids]
