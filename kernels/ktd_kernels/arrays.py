"""Memory for what the CPU kernels read and write often."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

_LINE = 64  # bytes of a cache line, and of the widest vector


def empty(shape: Sequence[int], dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """An array of undefined values that begins at a cache line, as numpy's own do not: no load of a vector
    then touches two. Memory is taken page by page, as it is first written."""
    kind = np.dtype(dtype)
    nbytes = math.prod(shape) * kind.itemsize
    raw = np.empty(nbytes + _LINE, np.uint8)
    start = -raw.ctypes.data % _LINE
    return raw[start : start + nbytes].view(kind).reshape(shape)
