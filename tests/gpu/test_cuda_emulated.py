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
  const auto kernel = tile == 1    ? product_1
                      : tile == 2  ? product_2
                      : tile == 4  ? product_4
                      : tile == 8  ? product_8
                      : tile == -4 ? several_4
                                   : several_8;
  launch(3, [=] { kernel(a); });
}
"""

EXPERTS = """#include "emulation.h"
#include "experts.cu"
#include "repack.cuh"
extern "C" void run(const u8* raw, u8* planes, int, const ProductArgs* arguments) {
  const ProductArgs a = *arguments;
  for (int i = 0; i < a.matrices; ++i)
    for (u64 unit = 0; unit < a.blocks * F::kUnits; ++unit)
      repack_unit<KTD_TYPE>(raw + i * a.blocks * F::kBytes, {planes + i * a.matrix_bytes, a.blocks}, unit);
  launch(2, [=] { product_experts(a); }, kWide);
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


def compiled(folder: Path, source: str, name: str, *more: str) -> ctypes.CDLL:
    (folder / "tables.cuh").write_text(tables.header())
    (folder / "host.cc").write_text(source)
    defines = [
        f"-DKTD_TYPE={name}",
        *([f"-DKTD_GRID=kTable{name}"] if kernels.has_table(name) else []),
        *more,
    ]
    flags = ["-std=c++20", "-O1", "-ffp-contract=off", "-fPIC", "-w", *defines]
    include = [f"-I{path}" for path in (SOURCES, Path(__file__).parent)]
    return ctypes.CDLL(
        str(build(folder, "host.so", [folder / "host.cc"], [*flags, *include], "-shared", "-pthread"))
    )


@pytest.fixture(scope="module", params=["Q4_K", "IQ1_S", "Q8_0"])
def make(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Emulated]:
    name = str(request.param)
    library = compiled(tmp_path_factory.mktemp(name), HARNESS, name)
    return lambda *shape: Emulated(library, name, *shape)


def check(got: F32, want: NDArray[np.float64]) -> None:
    """Integer sums are exact: what is left are some dozen additions of floats no larger than the result."""
    assert np.abs(got - want).max() <= 64 * 2.0**-24 * np.abs(want).max()


@pytest.mark.parametrize(
    ("n", "cols", "lanes"), [(1, 256, 8), (2, 512, 16), (3, 512, 16), (4, 1536, 32), (5, 1536, 128)]
)
def test_one_matrix(make: Callable[..., Emulated], n: int, cols: int, lanes: int) -> None:
    w, x, out = make(1, 21, cols), normal(1, n, cols), np.full((n, 21), np.nan, np.float32)
    tile = n if n < 3 else 4 if n <= 4 else 8
    numbers = {"slots": 1, "terms": 1, "tokens": n, "stacks": 1, "share": 1, "out_token": 21}
    seen = w.run(x, out, lanes, tile, **numbers)
    check(out, seen @ w.values[0].T)
    again, numbers["tokens"] = np.full((n, 21), np.nan, np.float32), 1  # of other kernels, with the same bits
    for token in range(n):
        w.run(x[token : token + 1], again[token : token + 1], lanes, 1, **numbers)
    np.testing.assert_array_equal(out, again)
    if tile >= 4:
        w.run(x, again, lanes, -tile, **numbers | {"tokens": n})
        np.testing.assert_array_equal(out, again)


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


@pytest.mark.parametrize(
    ("name", "cols", "rows", "used"),
    [("IQ1_S", 3072, 248, 1), ("IQ1_S", 1024, 20, 3), ("Q4_K", 2048, 40, 3), ("Q8_0", 1024, 20, 1)],
)
def test_experts_in_columns(tmp_path: Path, name: str, cols: int, rows: int, used: int) -> None:
    """Gate and up in one launch, or a sum over experts; more rows than are summed up at once."""
    defines = (f"-DKTD_COLS={cols}", f"-DKTD_TERMS={used}", "-DKTD_HALVES=28")
    library = compiled(tmp_path, EXPERTS, name, *defines)
    w, stacks, slots = Emulated(library, name, 5, rows, cols), 2 if used == 1 else 1, 6 // used
    ids = np.array([[4, 0, 3], [-1, 5, 2]], np.int32)
    x, weights = normal(5, 2 if used == 1 else 6, cols), np.abs(normal(6, 2, 3))
    out = normal(7, stacks * slots, rows)
    want = out.astype(np.float64)
    numbers = {"slots": slots, "terms": used, "tokens": 1, "stacks": stacks, "accumulate": 1}
    numbers |= {"out_stack": slots * rows, "out_slot": rows, "share": 3 if used == 1 else 1}
    seen = w.run(x, out, 32, 1, ids=ids, weights=weights, **numbers)
    for i, expert in enumerate(ids.flat):
        if 0 <= expert < 5:
            product = weights.flat[i] * (w.values[expert] @ seen[i // 3 if used == 1 else i])
            want[i // used :: slots] += product
    check(out, want)
