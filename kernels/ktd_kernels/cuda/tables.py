"""The lookup tables of the IQ formats as a CUDA header, generated from the `gguf` package.

Tables of groups of eight weights hold one nibble per weight, in order, which selects a byte of a permute
(formats.cuh); IQ3's groups of four are the magnitudes themselves. Where the CPU's layouts hold a group as
eight trits, a second table has its entry (unpack.cuh).
"""

from __future__ import annotations

import functools

import numpy as np
from gguf import quants
from numpy.typing import NDArray

Words = NDArray[np.uint32]


def _grid(fmt: type) -> NDArray[np.int64]:
    """[entries, values of an entry]."""
    fmt.init_grid()  # type: ignore[attr-defined]
    return np.asarray(fmt.grid).reshape(fmt.grid_shape).astype(np.int64)  # type: ignore[attr-defined]


def _nibbles(values: NDArray[np.int64]) -> Words:
    """[n, 8] values below 16 → a word each."""
    words: NDArray[np.int64] = (values << 4 * np.arange(8)).sum(axis=1)
    return words.astype(np.uint32)


def _spread_signs(fields: NDArray[np.uint8]) -> Words:
    """Bytes of eight sign bits → bit 2 of a nibble each."""
    return _nibbles((fields[:, None].astype(np.int64) >> np.arange(8) & 1) * 4)


def _tables() -> dict[str, list[Words]]:
    signs = np.frombuffer(bytes(quants.IQ2_XXS.ksigns), np.uint8)
    magnitudes = np.array([8, 25, 43])
    iq1 = _nibbles(_grid(quants.IQ1_S) + 1)
    tables = {"IQ1_S": [iq1], "IQ1_M": [iq1]}
    for name, fields in (("IQ2_XXS", signs), ("IQ2_XS", signs), ("IQ2_S", np.arange(256, dtype=np.uint8))):
        grid = _grid(getattr(quants, name))
        tables[name] = [_nibbles(np.searchsorted(magnitudes, grid)), _spread_signs(fields)]
    for name, tail in (("IQ3_XXS", [signs.view("<u4")]), ("IQ3_S", [])):
        grid = np.ascontiguousarray(_grid(getattr(quants, name)).astype(np.uint8))
        tables[name] = [grid.view("<u4").ravel(), *tail]
    return tables


def _entries() -> dict[str, NDArray[np.uint16]]:
    """The grid's entry for each group of eight trits, 0 for groups that the grid lacks. Of IQ2_S the first
    trit counts least; of IQ1 four pairs make a number to the base 9, the first pair counts least, and pair c
    is trits c and 4 + c, of which the first counts more."""
    iq1, iq2_s = _grid(quants.IQ1_S) + 1, np.searchsorted([8, 25, 43], _grid(quants.IQ2_S))
    pairs = np.concatenate([3 * 9 ** np.arange(4), 9 ** np.arange(4)])
    entries = {}
    for name, trits, places in (
        ("IQ1_S", iq1, pairs),
        ("IQ1_M", iq1, pairs),
        ("IQ2_S", iq2_s, 3 ** np.arange(8)),
    ):
        entries[name] = np.zeros(3**8, np.uint16)
        entries[name][trits @ places] = np.arange(len(trits))
    return entries


@functools.cache
def header() -> str:
    """tables.cuh: kTable<type> as 32-bit words, kEntries<type> as 16-bit ones, in whole pieces of 16
    bytes."""
    parts = ["#pragma once\n"]
    for name, pieces in _tables().items():
        words = np.concatenate(pieces)
        values = ",".join(f"{int(word):#x}u" for word in words)
        parts.append(f"KTD_TABLE u32 kTable{name}[{len(words)}] = {{{values}}};\n")
    for name, entries in _entries().items():
        values = ",".join(map(str, entries))
        parts.append(
            f"alignas(16) KTD_TABLE u16 kEntries{name}[{-(-len(entries) // 8) * 8}] = {{{values}}};\n"
        )
    return "".join(parts)
