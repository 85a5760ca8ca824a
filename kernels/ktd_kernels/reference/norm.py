"""Root mean square normalisation."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def rms_norm(x: NDArray[np.float32], weight: NDArray[np.float32], eps: float) -> NDArray[np.float64]:
    """x / sqrt(mean(x²) + eps) · weight over the last axis: x [n, d], weight [d] → [n, d]."""
    wide = x.astype(np.float64)
    normed: NDArray[np.float64] = wide / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return normed * weight.astype(np.float64)
