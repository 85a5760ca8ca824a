"""The device decoders, compiled for the host: every block type against gguf.quants, bit by bit."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import gguf
import numpy as np
import pytest
from kit_kernels import QUANTIZED_TYPES, block_size, blocks

import ktd_kernels
from ktd_kernels.cuda import kernels, tables

SOURCES = Path(ktd_kernels.__file__).parent / "cuda" / "src"
COMPILER = shutil.which("g++") or shutil.which("clang++")

HARNESS = """#include "repack.cuh"
template <int TYPE>
void run(const u8* raw, u8* planes, u64 blocks, float* out, const u32* table) {
  const u64 units = blocks * Format<TYPE>::kUnits;
  for (u64 unit = 0; unit < units; ++unit) repack_unit<TYPE>(raw, {planes, blocks}, unit);
  const Matrix<TYPE> matrix = matrix_at<TYPE>(planes, blocks);
  for (u32 unit = 0; unit < units; ++unit) {
    Raw<TYPE> raw_unit;
    Unit o;
    fetch(matrix, unit, raw_unit);
    decode(raw_unit, unit % Format<TYPE>::kUnits, table, o);
    for (int i = 0; i < 32; ++i) out[32 * unit + i] = weight<TYPE>(o, i);
  }
}
"""


def entry(name: str) -> str:
    table = f"kTable{name}" if kernels.has_table(name) else "nullptr"
    return (
        f'extern "C" void run_{name}(const u8* raw, u8* planes, u64 blocks, float* out) '
        f"{{ run<{name}>(raw, planes, blocks, out, {table}); }}\n"
    )


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The decoders as a shared library of the host."""
    if COMPILER is None:
        pytest.skip("no C++ compiler on this machine")
    folder = tmp_path_factory.mktemp("decoders")
    (folder / "tables.cuh").write_text(tables.header())
    (folder / "host.cc").write_text(HARNESS + "".join(map(entry, QUANTIZED_TYPES)))
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    command = [COMPILER, *flags, "-Wno-unknown-pragmas", "-I", str(folder), "-I", str(SOURCES)]
    subprocess.run([*command, str(folder / "host.cc"), "-o", str(folder / "host.so")], check=True)
    return ctypes.CDLL(str(folder / "host.so"))


@pytest.mark.parametrize("name", QUANTIZED_TYPES)
@pytest.mark.parametrize("scale", [1.0, None], ids=["sane", "extreme"])
def test_decodes_as_the_oracle(host: ctypes.CDLL, name: str, scale: float | None) -> None:
    raw = blocks(name, 48, 1024, scale=scale)
    planes, out = np.full(raw.size, 0xAA, np.uint8), np.full((48, 1024), np.nan, np.float32)
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (raw, planes, out)]
    count = ctypes.c_uint64(48 * 1024 // block_size(name))
    getattr(host, f"run_{name}")(*pointers[:2], count, pointers[2])
    with np.errstate(all="ignore"):
        want = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(out.view(np.uint32), want.view(np.uint32))


def test_every_block_type_has_kernels() -> None:
    assert {f.name for f in kernels.FORMATS.values()} == {*QUANTIZED_TYPES, "F32", "F16", "BF16"}
