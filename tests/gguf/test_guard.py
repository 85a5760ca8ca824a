"""A model's file that is cut short while it is in use."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import kit
import numpy as np
import pytest

from ktd.errors import FileLost
from ktd.gguf import GgufFile

# Another mapping than the guarded one is cut short, or the signal has nothing to do with one.
FOREIGN = """
import faulthandler, mmap, os, sys
import numpy as np
from ktd.gguf import GgufFile

faulthandler.enable(2)
model = GgufFile.open(__import__("pathlib").Path(sys.argv[1]))
model.guard()
with open(sys.argv[2], "rb") as file:
    other = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
print("guarded", flush=True)
if sys.argv[3] == "read":
    os.truncate(sys.argv[2], 0)
    other.sum()
else:
    os.kill(os.getpid(), 7)
print("went on", flush=True)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    tensors: dict[str, kit.Tensor] = {
        "first.weight": np.full((8, 4096), 1.0, np.float32),
        "last.weight": np.full((8, 4096), 2.0, np.float32),
    }
    return kit.write_gguf(tmp_path / "m.gguf", {}, tensors)


@pytest.fixture(autouse=True)
def _only_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ktd.gguf.watch.EVERY", 60.0)


def test_what_is_gone_reads_as_zeros_and_is_told(path: Path) -> None:
    size = path.stat().st_size
    with GgufFile.open(path) as other, GgufFile.open(path) as gguf:
        gguf.guard()
        other.guard()
        first, last = (gguf.data(name).view(np.float32) for name in ("first.weight", "last.weight"))
        os.truncate(path, size - last.nbytes // 2)
        gguf.check()
        assert (first == 1).all()
        assert last[0] == 2
        gguf.check()
        assert last.sum() <= last.size
        with pytest.raises(FileLost, match=r"m\.gguf was cut short"):
            gguf.check()
        assert first[0] == 1
        assert last[-1] == 0
        other.check()
    with GgufFile.open(kit.write_gguf(path.with_name("next.gguf"), {})) as later:
        later.guard()  # in the place of one that was broken
        later.check()


@pytest.mark.parametrize("how", ["read", "sent"])
def test_other_faults_end_the_process_as_ever(path: Path, how: str) -> None:
    other = path.with_name("other")
    other.write_bytes(bytes(1 << 16))
    command = [sys.executable, "-c", FOREIGN, str(path), str(other), how]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.stdout == "guarded\n"
    assert ended.returncode == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in ended.stderr
