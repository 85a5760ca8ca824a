"""The arithmetic of the AMX path on machines without AMX: plain loops stand for the tile instructions."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from kit_compile import build

from ktd_kernels import isa_list

SOURCES = Path(__file__).parents[2] / "kernels" / "csrc"
FLAGS = [
    *("-std=c++20", "-O1", "-ffp-contract=off", "-w"),
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni"),
    *("-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mpopcnt"),
]


@pytest.mark.slow
def test_emulated_tiles_give_the_bits_of_avx512(tmp_path: Path) -> None:
    if "avx512" not in isa_list():
        pytest.skip("needs a CPU with AVX-512 VNNI")
    grids = tmp_path / "grids.cc"
    subprocess.run([sys.executable, str(SOURCES / "formats" / "generate_grids.py"), str(grids)], check=True)
    sources = [Path(__file__).with_name("amx_emulated.cc"), grids]
    program = build(tmp_path, "amx_emulated", sources, [*FLAGS, f"-I{SOURCES}"])
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout) == (0, "")
