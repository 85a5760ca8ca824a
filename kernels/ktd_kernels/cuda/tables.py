"""The lookup tables of the IQ formats as a CUDA header, generated from the `gguf` package."""

from __future__ import annotations

import functools

import numpy as np
from gguf import quants
from numpy.typing import NDArray


def _grid(fmt: type) -> NDArray[np.int64]:
    """[entries, values of an entry]."""
    fmt.init_grid()  # type: ignore[attr-defined]
    return np.asarray(fmt.grid).reshape(fmt.grid_shape).astype(np.int64)  # type: ignore[attr-defined]


def _nibbles() -> NDArray[np.uint32]:
    """IQ1's eight values plus 1 of an entry in one word: values 0..3 in low nibbles, 4..7 in high ones."""
    values = (_grid(quants.IQ1_S) + 1).astype(np.uint8)
    return np.ascontiguousarray(values[:, :4] | values[:, 4:] << 4).view("<u4").ravel()


@functools.cache
def header() -> str:
    """tables.cuh: kTable<type> as 32-bit words, a grid and, where signs are 7-bit fields, their 128 bytes."""
    signs = np.frombuffer(bytes(quants.IQ2_XXS.ksigns), np.uint8).view("<u4")
    tables: dict[str, list[NDArray[np.uint32]]] = {"IQ1_S": [_nibbles()], "IQ1_M": [_nibbles()]}
    for name, signed in (
        ("IQ2_XXS", True),
        ("IQ2_XS", True),
        ("IQ2_S", False),
        ("IQ3_XXS", True),
        ("IQ3_S", False),
    ):
        grid = np.ascontiguousarray(_grid(getattr(quants, name)).astype(np.uint8)).view("<u4").ravel()
        tables[name] = [grid, signs] if signed else [grid]
    parts = ["#pragma once\n"]
    for name, pieces in tables.items():
        words = np.concatenate(pieces)
        values = ",".join(f"{int(word):#x}u" for word in words)
        parts.append(f"KTD_TABLE u32 kTable{name}[{len(words)}] = {{{values}}};\n")
    return "".join(parts)
