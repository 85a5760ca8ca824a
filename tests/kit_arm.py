"""The kernels for ARM processors on another machine: built with a cross compiler, run by qemu."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kit_kernels import F32, type_id
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
COMPILER, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
BUILD = ROOT / "build" / "emulated" / "aarch64"
PROGRAM, OBJECTS = BUILD / "kernels" / "csrc" / "program", BUILD / "kernels" / "csrc" / "CMakeFiles"
PRODUCT, MOE, ATTENTION, RMS_NORM, ROPE, STORE, DEQUANTIZE, DRAW, SCORE = range(9)


def build() -> Path:
    """tests/kernels/arm_program.cc with the kernels; skips where the cross compiler or qemu is missing."""
    for tool, package in ((COMPILER, "g++-aarch64-linux-gnu"), (QEMU, "qemu-user-static")):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool} on this machine (apt install {package})")
    path = (
        f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # cmake and ninja of the environment
    )
    environment = {**os.environ, "PATH": path}
    configure = [
        *("cmake", "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja"),
        *(
            "-DCMAKE_SYSTEM_NAME=Linux",
            "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
            f"-DCMAKE_CXX_COMPILER={COMPILER}",
        ),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-DKTD_PROGRAM={ROOT}/tests/kernels/arm_program.cc"),
    ]
    for command in (configure, ["cmake", "--build", str(BUILD)]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return PROGRAM


def features(processor: str) -> tuple[list[str], list[str]]:
    """The instruction sets and features that the program finds on a processor that qemu knows."""
    command = [QEMU, "-cpu", processor, str(PROGRAM)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return lines[0].split(), lines[1].split()


class ArmCpu:
    """Three threads of an emulated processor, and the kernels of one of its instruction sets."""

    def __init__(self, isa: str, processor: str) -> None:
        command = [QEMU, "-cpu", processor, str(PROGRAM), isa]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def close(self) -> None:
        self._process.communicate()
        assert self._process.returncode == 0

    def _ask(self, op: int, numbers: list[int], *arrays: NDArray[Any]) -> NDArray[Any]:
        """The last array as the op leaves it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        parts = [np.array([op, len(numbers), *numbers, len(arrays)], np.int64).tobytes()]
        for array in arrays:
            data = np.ascontiguousarray(array).tobytes()
            parts += [len(data).to_bytes(8, "little"), data]
        self._process.stdin.write(b"".join(parts))
        self._process.stdin.flush()
        size = int.from_bytes(self._process.stdout.read(8), "little")
        out = np.frombuffer(self._process.stdout.read(size), arrays[-1].dtype)
        return out.reshape(arrays[-1].shape)

    def product(
        self, name: str, w: NDArray[np.uint8], x: F32, few: int = 4, before: F32 | None = None
    ) -> F32:
        """x @ w.T, added to `before`; up to `few` tokens by the path for few."""
        shape = len(x), len(w)
        out = np.full(shape, np.nan, np.float32) if before is None else before
        numbers = [type_id(name), len(w), x.shape[1], len(x), few, int(before is not None)]
        return self._ask(PRODUCT, numbers, w, x, out)

    def dequantize(self, name: str, w: NDArray[np.uint8], cols: int) -> F32:
        return self._ask(DEQUANTIZE, [type_id(name), len(w), cols], w, np.empty((len(w), cols), np.float32))

    def moe(
        self,
        mix: tuple[str, ...],
        w: list[NDArray[np.uint8]],
        sizes: list[int],
        x: F32,
        ids: NDArray[np.int32],
        weights: F32,
    ) -> F32:
        """`mix`, `w`: types and blocks of gate, up and down; `sizes`: experts, hidden, width."""
        numbers = [*map(type_id, mix), *sizes, len(x), ids.shape[1]]
        return self._ask(MOE, numbers, *w, x, ids, weights, np.full_like(x, np.nan))

    def rms_norm(self, x: F32, weight: F32, eps: float) -> F32:
        return self._ask(RMS_NORM, list(x.shape), x, weight, np.float32([eps]), np.full_like(x, np.nan))

    def rope(self, x: F32, positions: NDArray[np.int32], table: F32) -> F32:
        return self._ask(ROPE, list(x.shape), positions, table, x)

    def store_latent(
        self, latent: F32, slots: NDArray[np.int64], cache: NDArray[np.uint16]
    ) -> NDArray[np.uint16]:
        return self._ask(STORE, list(latent.shape), latent, slots, cache)

    def mla_attention(
        self,
        latent: F32,
        rope: F32,
        cache: NDArray[Any],
        table: NDArray[np.int32],
        rows: NDArray[np.int32],
        context: NDArray[np.int32],
        scale: float,
        out: F32,
    ) -> None:
        n, heads, r = latent.shape
        bf16 = cache.dtype == np.uint16
        numbers = [int(bf16), cache.shape[1], table.shape[1], n, heads, r, rope.shape[2]]
        arrays = latent, rope, cache, table, rows, context, np.float32([scale]), out
        out[:] = self._ask(ATTENTION, numbers, *arrays)

    def draw(
        self, logits: F32, rows: NDArray[np.int32], rules: NDArray[np.float64], tokens: NDArray[np.int32]
    ) -> None:
        given = rules.copy()
        given[:, 1] = rules[:, 1].astype(np.int64).view(np.float64)  # top_k
        tokens[:] = self._ask(DRAW, [len(rows), logits.shape[1]], logits[rows], _counted(rows), given, tokens)

    def score(
        self, logits: F32, rows: NDArray[np.int32], totals: NDArray[np.float64], ids: NDArray[np.int32]
    ) -> None:
        """Gives the totals alone."""
        numbers = [len(rows), logits.shape[1], ids.shape[1]]
        totals[:] = self._ask(SCORE, numbers, logits[rows], _counted(rows), ids, totals)


def _counted(rows: NDArray[np.int32]) -> NDArray[np.int32]:
    return np.arange(len(rows), dtype=np.int32)
