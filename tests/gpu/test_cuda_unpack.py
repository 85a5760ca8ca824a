"""What the CPU's packed layouts become on the device: the planes of the file's blocks, bit by bit. The CUDA
source runs on the host here; test_upload.py does the same on a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from kit_compile import build, keep_cubins
from kit_kernels import blocks, type_id
from numpy.typing import NDArray

import ktd_kernels
from ktd_kernels import Cpu, Weight, isa_list
from ktd_kernels.cuda import nvrtc, tables
from ktd_kernels.cuda.kernels import unpack_cubin
from ktd_kernels.cuda.packed import LAYOUTS, UnpackArgs, unpack_args

SOURCES = Path(ktd_kernels.__file__).parent / "cuda" / "src"
TYPES = [GGMLQuantizationType(kind).name for _, kind in LAYOUTS]
IN_TRITS = [name for name in TYPES if type_id(name) in (19, 22, 29)]
#: Matrices, rows, columns: whole groups of rows, part of one, several, stacks.
SHAPES = [(1, 16, 256), (1, 1, 512), (1, 33, 256), (3, 16, 512), (5, 41, 1280), (2, 96, 768)]

HARNESS = """#include "emulation.h"
#include "repack.cuh"
#include "unpack.cuh"
template <int TYPE>
void file(const u8* raw, u8* out, u64 matrix_bytes, u64 blocks, u64 matrices) {
  for (u64 i = 0; i < matrices; ++i)
    for (u64 unit = 0; unit < 8 * blocks; ++unit)
      repack_unit<TYPE>(raw + i * blocks * Format<TYPE>::kBytes, {out + i * matrix_bytes, blocks}, unit);
}
template <int TYPE, int P>
void copy(const UnpackArgs& a, const Place& place, const Fields& fields) {
  memcpy(plane_at<TYPE, P>(a, place), fields.words[P], Format<TYPE>::template width<P>);
}
template <int TYPE>
void packed(const UnpackArgs* a, const u16* entries) {
  for (u32 block = 0; block < a->packed_blocks; ++block)
    for (int r = 0; r < kGroupRows; ++r) {
      const auto* blocks = reinterpret_cast<const Packed<TYPE>*>(a->packed);
      Fields fields;
      unpack(Tag<TYPE>{}, blocks[block], r, entries, fields);
      const Place place = place_of(*a, block, r);
      if (place.index == kNowhere) continue;
      copy<TYPE, 0>(*a, place, fields), copy<TYPE, 1>(*a, place, fields), copy<TYPE, 2>(*a, place, fields);
      copy<TYPE, 3>(*a, place, fields), copy<TYPE, 4>(*a, place, fields);
    }
}
#define ENTRY(NAME, ENTRIES)                                                                 \\
  extern "C" void file_##NAME(const u8* raw, u8* out, u64 matrix_bytes, u64 blocks, u64 n) { \\
    file<NAME>(raw, out, matrix_bytes, blocks, n);                                           \\
  }                                                                                          \\
  extern "C" void packed_##NAME(const UnpackArgs* a) { packed<NAME>(a, ENTRIES); }
"""

KERNEL = """#include "emulation.h"
#include "unpack.cu"
extern "C" void run(const UnpackArgs* arguments) {
  const UnpackArgs a = *arguments;
  launch(3, [=] { unpack(a); });
}
"""

Bytes = NDArray[np.uint8]


def compiled(folder: Path, source: str, *flags: str) -> ctypes.CDLL:
    (folder / "tables.cuh").write_text(tables.header())
    (folder / "host.cc").write_text(source)
    flags = ("-O1", "-fPIC", "-Wno-unknown-pragmas", *flags, f"-I{SOURCES}", f"-I{Path(__file__).parent}")
    return ctypes.CDLL(str(build(folder, "host.so", [folder / "host.cc"], flags, "-shared", "-pthread")))


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The device functions of every type as a library of the host."""
    entries = [f"ENTRY({n}, {f'kEntries{n}' if n in IN_TRITS else 'nullptr'})\n" for n in TYPES]
    flags = ("-std=c++20", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function")
    return compiled(tmp_path_factory.mktemp("unpack"), HARNESS + "".join(entries), *flags)


def packed(name: str, count: int, rows: int, cols: int) -> tuple[Bytes, Weight]:
    """Random blocks of a stack, and the stack packed in a layout that the GPU knows."""
    raw = blocks(name, count * rows, cols, seed=rows, scale=None).ravel()
    for isa in isa_list():
        cpu = Cpu(1, isa)
        if cpu.packed_bytes(type_id(name), (rows, cols)):
            weight = cpu.pack(Weight(raw, type_id(name), (count, rows, cols)))
            if (weight.layout, type_id(name)) in LAYOUTS:
                return raw, weight
    pytest.skip("this machine packs in other layouts")


def aligned(nbytes: int) -> Bytes:
    room = np.full(nbytes + 16, 0xAA, np.uint8)
    return room[-room.ctypes.data % 16 :][:nbytes]


def pointer(array: Bytes) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def matrix_bytes(name: str, rows: int, cols: int) -> int:
    return -(-rows * cols // 256 * GGML_QUANT_SIZES[GGMLQuantizationType[name]][1] // 16) * 16


def planes_of_file(host: ctypes.CDLL, name: str, raw: Bytes, shape: tuple[int, int, int]) -> Bytes:
    count, rows, cols = shape
    size = matrix_bytes(name, rows, cols)
    out = aligned(count * size)
    numbers = [ctypes.c_uint64(n) for n in (size, rows * cols // 256, count)]
    getattr(host, f"file_{name}")(pointer(raw), pointer(out), *numbers)
    return out


def planes_of_packed(run: Callable[..., None], name: str, weight: Weight) -> Bytes:
    count, rows, cols = weight.shape
    size = matrix_bytes(name, rows, cols)
    out, data = aligned(count * size), weight.bytes
    arguments: UnpackArgs = unpack_args(weight.layout, weight.ggml_type, weight.shape, data.size, size)
    arguments.packed, arguments.out = data.ctypes.data, out.ctypes.data
    run(ctypes.byref(arguments))
    return out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", TYPES)
def test_planes_are_those_of_the_file(host: ctypes.CDLL, name: str, shape: tuple[int, int, int]) -> None:
    raw, weight = packed(name, *shape)
    want = planes_of_file(host, name, raw, shape)
    got = planes_of_packed(getattr(host, f"packed_{name}"), name, weight)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("name", TYPES)
def test_a_part_of_a_stack_is_unpacked_alone(host: ctypes.CDLL, name: str) -> None:
    raw, weight = packed(name, 5, 41, 512)
    size = raw.size // 5
    want = planes_of_file(host, name, raw[2 * size : 4 * size], (2, 41, 512))
    got = planes_of_packed(getattr(host, f"packed_{name}"), name, weight.part(2, 2))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("byte", [0x00, 0xFF])
@pytest.mark.parametrize("name", TYPES)
def test_extreme_codes(host: ctypes.CDLL, name: str, byte: int) -> None:
    shape = (1, 17, 256)
    raw, weight = packed(name, *shape)
    raw[:] = byte
    for isa in isa_list():
        cpu = Cpu(1, isa)
        if cpu.packed_bytes(type_id(name), shape):
            again = cpu.pack(Weight(raw, type_id(name), shape))
            if again.layout == weight.layout:
                got = planes_of_packed(getattr(host, f"packed_{name}"), name, again)
                np.testing.assert_array_equal(got, planes_of_file(host, name, raw, shape), err_msg=isa)


@pytest.mark.parametrize(("name", "count"), [("IQ1_S", 2048), ("IQ1_M", 2048), ("IQ2_S", 1024)])
def test_every_entry_of_the_grid_is_found_again(name: str, count: int) -> None:
    assert np.array_equal(np.unique(tables._entries()[name]), np.arange(count))


@pytest.mark.slow
@pytest.mark.parametrize("name", TYPES)
def test_the_kernel_on_host_threads(host: ctypes.CDLL, name: str, tmp_path: Path) -> None:
    entries = [f"-DKTD_ENTRIES=kEntries{name}"] if name in IN_TRITS else []
    library = compiled(tmp_path, KERNEL, "-std=c++20", "-w", f"-DKTD_TYPE={name}", *entries)
    # Neighbours write together: of one row, of two groups of rows, of two matrices, beside filling.
    for shape in [(3, 41, 512), (5, 33, 256), (2, 17, 1280)]:
        raw, weight = packed(name, *shape)
        got, want = planes_of_packed(library.run, name, weight), planes_of_file(host, name, raw, shape)
        np.testing.assert_array_equal(got, want, err_msg=str(shape))


@pytest.mark.slow
@pytest.mark.parametrize("name", TYPES)
def test_the_kernel_compiles_for_every_architecture(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_cubins(monkeypatch, tmp_path)
    try:
        known = sorted(nvrtc.supported().intersection(nvrtc.ARCHITECTURES))
    except nvrtc.NvrtcError as error:
        pytest.skip(str(error))
    for arch in known:
        assert unpack_cubin(type_id(name), arch).startswith(b"\x7fELF")


def test_a_layout_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="layout 'codes' cannot be unpacked"):
        unpack_args("codes", type_id("IQ3_S"), (1, 16, 256), 1760, 1760)


def test_bytes_that_do_not_fit_are_refused() -> None:
    assert unpack_args("grid", type_id("IQ3_S"), (2, 17, 256), 4 * 1760, 1888).packed_blocks == 4
    with pytest.raises(
        ValueError, match="2 matrices 17 x 256 take 7040 bytes in the layout 'grid', not 7039"
    ):
        unpack_args("grid", type_id("IQ3_S"), (2, 17, 256), 7039, 1888)
