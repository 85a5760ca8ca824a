"""The attention of AMX on machines without AMX: plain loops stand for the tile instructions."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kit_attention import check, make_case
from kit_compile import build

from ktd_kernels import isa_list, reference

SOURCES = Path(__file__).parents[2] / "kernels" / "csrc"
FLAGS = ["-std=c++20", "-O2", "-ffp-contract=off", "-w", "-fPIC", "-march=cascadelake"]


class _Attention(ctypes.Structure):
    """struct Attention of kernels/csrc/ops_table.h."""

    _fields_ = (
        *(("q_latent", ctypes.c_void_p), ("q_latent_row", ctypes.c_int64), ("q_latent_head", ctypes.c_int64)),
        *(("q_rope", ctypes.c_void_p), ("q_rope_row", ctypes.c_int64), ("q_rope_head", ctypes.c_int64)),
        *(("cache", ctypes.c_void_p), ("bf16", ctypes.c_bool), ("page_size", ctypes.c_int64)),
        *(("page_table", ctypes.c_void_p), ("page_table_row", ctypes.c_int64)),
        *(("seq_of_row", ctypes.c_void_p), ("context", ctypes.c_void_p), ("scale", ctypes.c_float)),
        *(("heads", ctypes.c_int64), ("r", ctypes.c_int64), ("dr", ctypes.c_int64), ("out", ctypes.c_void_p)),
    )


@dataclass(frozen=True)
class EmulatedTiles:
    """The attention of AMX with plain loops for its tile instructions."""

    library: ctypes.CDLL
    threads: int = 3

    def mla_attention(self, *arguments: Any) -> None:
        latent, rope, cache, table, seq_of_row, context, scale, out = arguments
        strides = [[size // 4 for size in q.strides[:2]] for q in (latent, rope)]
        told = _Attention(
            *(latent.ctypes.data, *strides[0], rope.ctypes.data, *strides[1]),
            *(cache.ctypes.data, cache.dtype == np.uint16, cache.shape[1], table.ctypes.data, table.shape[1]),
            *(seq_of_row.ctypes.data, context.ctypes.data, scale, latent.shape[1], latent.shape[2]),
            *(rope.shape[2], out.ctypes.data),
        )
        self.library.emulated_attention(ctypes.byref(told), ctypes.c_int64(len(out)), self.threads)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> EmulatedTiles:
    if "avx512" not in isa_list():
        pytest.skip("needs a CPU with AVX-512 VNNI")
    sources = [Path(__file__).with_name("amx_attention_emulated.cc")]
    sources += [SOURCES / name for name in ("ops/ops_attention.cc", "machine/pool.cc")]
    folder = tmp_path_factory.mktemp("tiles")
    library = build(folder, "attention.so", sources, [*FLAGS, f"-I{SOURCES}"], "-shared")
    return EmulatedTiles(ctypes.CDLL(str(library)))


@pytest.mark.parametrize("dims", [(1, 32, 32, 16), (33, 96, 32, 48), (16, 512, 64, 64), (3, 32, 32, 8)])
def test_tiles_match_reference(tiles: EmulatedTiles, dims: tuple[int, int, int, int]) -> None:
    case = make_case([[1, 2, 15, 33, 128, 129], [300, 64], [0, 700]], *dims, bf16=True)
    check(case, case.run(tiles))


def test_parts_of_a_float_lose_nothing(tiles: EmulatedTiles) -> None:
    """Scores that differ in a query's 18th bit, and weights whose sum must be that of the values."""
    case = make_case([[40]], 3, 32, 32, 16, bf16=True)
    case.q[:] = 0
    case.q[..., 0], case.q[..., 1] = 1 + 2.0**-18, 1
    keys = np.zeros((*case.cache.shape[:2], 64), np.float32)
    keys[:, ::2, 0] = keys[:, 1::2, 1] = 4096
    keys[:, :, 2] = 1
    case = replace(case, cache=reference.to_bf16(keys), scale=1.0)
    out = case.run(tiles)
    np.testing.assert_allclose(out[:, :, :2], case.reference()[:, :, :2], rtol=1e-3)
    np.testing.assert_allclose(out[:, :, 2], 1, rtol=1e-6)


def test_rows_on_tiles_do_not_depend_on_each_other(tiles: EmulatedTiles) -> None:
    """Nor on the tokens of later rows in their block, which may not be finite."""
    case = make_case([[*range(250, 262), 1300], [1, 40, 900, 900], [255]], 20, 32, 32, 16, bf16=True)
    together = case.run(replace(tiles, threads=1))
    order = np.random.default_rng(5).permutation(len(together)).tolist()
    np.testing.assert_array_equal(case.run(tiles, order), together[order])
    for row in range(len(together)):
        np.testing.assert_array_equal(case.run(tiles, [row])[0], together[row])
    case.cache[case.page_table[0, 259 // 16], 259 % 16] = 0x7FC0  # of a block's last two rows, not its first
    poisoned = case.run(tiles)
    later = (case.seq_of_row == 0) & (case.context > 259)
    np.testing.assert_array_equal(poisoned[~later], together[~later])
    assert np.isnan(poisoned[later]).all()
