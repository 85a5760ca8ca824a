"""The product kernels on host threads, without a GPU: plain, grouped by expert, summed over experts."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from kit_compile import build
from kit_kernels import F32, block_size, blocks, normal
from numpy.typing import NDArray

import ktd_kernels
from ktd_kernels.cuda import kernels, tables
from ktd_kernels.cuda.product import ProductArgs

SOURCES = Path(ktd_kernels.__file__).parent / "cuda" / "src"

pytestmark = pytest.mark.slow

HARNESS = """#include "emulation.h"
#include "quantized.cu"
extern "C" void run(const u8* raw, u8* planes, int tile, const ProductArgs* arguments) {
  const ProductArgs a = *arguments;
  for (int i = 0; i < a.matrices; ++i)
    for (u64 unit = 0; unit < a.blocks * F::kUnits; ++unit)
      repack_unit<KTD_TYPE>(raw + i * a.blocks * F::kBytes, {planes + i * a.matrix_bytes, a.blocks}, unit);
  const auto kernel = tile == 1 ? product_1 : tile == 2 ? product_2 : tile == 4 ? product_4 : product_8;
  launch(3, [=] { kernel(a); });
}
"""

Run = Callable[..., NDArray[np.float32]]


def aligned(values: NDArray[np.generic]) -> NDArray[np.generic]:
    """A copy that starts at a multiple of 16 bytes, as device memory does."""
    room = np.zeros(values.nbytes + 16, np.uint8)
    start = -room.ctypes.data % 16
    copy = room[start : start + values.nbytes].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return copy


def quantized(x: F32, block: int) -> tuple[NDArray[np.int8], F32, NDArray[np.int32]]:
    """int8 rows, a scale per block, and the sums of 16 and 16 of every 32 in one word."""
    parts = x.reshape(-1, block)
    top = np.abs(parts).max(axis=1, keepdims=True)
    q = np.rint(parts * (np.float32(127) / top)).astype(np.int8).reshape(x.shape)
    sums = q.reshape(*x.shape[:-1], -1, 2, 16).astype(np.int32).sum(axis=-1)
    packed = (sums[..., 0] & 0xFFFF) | sums[..., 1] << 16
    return q, (top / np.float32(127)).reshape(len(x), -1), packed.astype(np.int32)


class Emulated:
    """A stack of matrices of one type and the kernels for it."""

    def __init__(self, library: ctypes.CDLL, name: str, count: int, rows: int, cols: int) -> None:
        self.library, self.block, self.shape = library, block_size(name), (count, rows, cols)
        self.raw = blocks(name, count * rows, cols)
        values = gguf.quants.dequantize(self.raw, gguf.GGMLQuantizationType[name])
        self.values = values.astype(np.float64).reshape(self.shape)

    def run(self, x: F32, out: F32, lanes: int, tile: int, **numbers: int | NDArray[np.generic]) -> F32:
        """Launch with the fields of ProductArgs in `numbers`; returns what x looks like in int8."""
        count, rows, cols = self.shape
        args = ProductArgs(rows=rows, cols=cols, matrices=count, blocks=rows * cols // self.block)
        size = self.raw.size // count
        args.matrix_bytes = size + -size % 16
        planes = aligned(np.zeros(args.matrix_bytes * count, np.uint8))
        args.w[0] = args.w[1] = planes.ctypes.data
        q, scales, sums = quantized(x, self.block)
        held = [aligned(q), scales, sums]
        args.q, args.scales, args.sums = (a.ctypes.data for a in held)
        args.out = out.ctypes.data
        for name, value in numbers.items():
            setattr(args, name, value.ctypes.data if isinstance(value, np.ndarray) else value)
        args.term_warps = math.gcd(args.terms, 8)
        args.lanes = 32 * args.term_warps if args.term_warps > 1 else lanes
        self.library.run(
            ctypes.c_void_p(self.raw.ctypes.data),
            ctypes.c_void_p(planes.ctypes.data),
            tile,
            ctypes.byref(args),
        )
        seen = q.reshape(len(x), -1, self.block) * scales.astype(np.float64)[..., None]
        return seen.reshape(x.shape)


@pytest.fixture(scope="module", params=["Q4_K", "IQ1_S", "Q8_0"])
def make(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Emulated]:
    name = str(request.param)
    folder = tmp_path_factory.mktemp(name)
    (folder / "tables.cuh").write_text(tables.header())
    (folder / "host.cc").write_text(HARNESS)
    defines = [f"-DKTD_TYPE={name}", *([f"-DKTD_GRID=kTable{name}"] if kernels.has_table(name) else [])]
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-fPIC", "-w", *defines]
    include = [f"-I{path}" for path in (SOURCES, Path(__file__).parent)]
    built = build(folder, "host.so", [folder / "host.cc"], [*flags, *include], "-shared", "-pthread")
    library = ctypes.CDLL(str(built))
    return lambda *shape: Emulated(library, name, *shape)


def check(got: F32, want: NDArray[np.float64]) -> None:
    """Integer sums are exact: what is left are some dozen additions of floats no larger than the result."""
    assert np.abs(got - want).max() <= 64 * 2.0**-24 * np.abs(want).max()


@pytest.mark.parametrize(("n", "cols", "lanes"), [(1, 256, 8), (2, 512, 16), (4, 1536, 32), (5, 1536, 128)])
def test_one_matrix(make: Callable[..., Emulated], n: int, cols: int, lanes: int) -> None:
    w, x, out = make(1, 21, cols), normal(1, n, cols), np.full((n, 21), np.nan, np.float32)
    tile = n if n < 4 else 4 if n == 4 else 8
    seen = w.run(x, out, lanes, tile, slots=1, terms=1, tokens=n, stacks=1, share=1, out_token=21)
    check(out, seen @ w.values[0].T)


def test_experts_of_tokens(make: Callable[..., Emulated]) -> None:
    """Two stacks in one launch; expert ids out of range give zeros."""
    w, x, out = make(6, 37, 512), normal(2, 3, 512), np.full((2, 6, 37), np.nan, np.float32)
    ids = np.array([[0, 5], [-1, 3], [6, 2]], np.int32)
    numbers = {"slots": 6, "terms": 1, "tokens": 1, "stacks": 2, "share": 2}
    seen = w.run(x, out, 32, 1, ids=ids, out_stack=6 * 37, out_slot=37, out_token=37, **numbers)
    want = [w.values[e] @ seen[i // 2] if 0 <= e < 6 else np.zeros(37) for i, e in enumerate(ids.flat)]
    check(out, np.stack([want, want]))


@pytest.mark.parametrize("used", [3, 4])
def test_sums_over_experts(make: Callable[..., Emulated], used: int) -> None:
    w, x, out = make(6, 37, 512), normal(3, 2 * used, 512), np.full((2, 37), np.nan, np.float32)
    ids = np.array([[4, 0, -1, 2], [1, 9, 5, 3]], np.int32)[:, :used].copy()
    weights = np.abs(normal(4, 2, used))
    numbers = {"slots": 2, "terms": used, "tokens": 1, "stacks": 1, "share": 1}
    seen = w.run(x, out, 32, 1, ids=ids, weights=weights, out_slot=37, out_token=37, **numbers)
    want = np.zeros((2, 37))
    for t, j in np.ndindex(2, used):
        if 0 <= ids[t, j] < 6:
            want[t] += weights[t, j] * (w.values[ids[t, j]] @ seen[t * used + j])
    check(out, want)
