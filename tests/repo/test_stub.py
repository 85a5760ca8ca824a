"""The committed stub of the kernel module is what nanobind makes of the built one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

STUB = Path(__file__).parents[2] / "kernels/ktd_kernels/_C.pyi"


def test_the_stub_is_current(tmp_path: Path) -> None:
    made = tmp_path / "_C.pyi"
    command = [sys.executable, "-m", "nanobind.stubgen", "-q", "-m", "ktd_kernels._C", "-o", str(made)]
    subprocess.run(command, check=True)
    assert made.read_text() == STUB.read_text(), "run `make stub` and commit kernels/ktd_kernels/_C.pyi"
