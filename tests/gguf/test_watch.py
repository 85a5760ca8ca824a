"""A model's file that is overwritten while it is in use, and what only looks like it."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from kit import write_gguf

from ktd.errors import FileLost, GgufError
from ktd.gguf import GgufFile
from ktd.gguf.shard import Shard


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("ktd.gguf.watch.EVERY", 0.01)
    return write_gguf(tmp_path / "m.gguf", {}, {"a.weight": np.full((64, 4096), 1.0, np.float32)})


def lost(gguf: GgufFile, seconds: float) -> bool:
    """Whether it is noticed within `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            gguf.check()
        except FileLost as error:
            return "m.gguf was cut short or overwritten" in str(error)
        time.sleep(0.01)
    return False


def test_another_content_in_the_same_place(path: Path) -> None:
    with GgufFile.open(path) as gguf:
        gguf.guard()
        with path.open("r+b") as file:  # its beginning, as a copy that has just begun
            file.seek(4096)
            file.write(bytes(40_000))
        assert lost(gguf, 5)


def test_a_cut_within_the_last_page(path: Path) -> None:
    with GgufFile.open(path) as gguf:
        gguf.guard()
        os.truncate(path, path.stat().st_size - 10)
        assert lost(gguf, 5)


def test_what_harms_nobody(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another time, other rights, another name, and another file under the old one."""
    new = path.with_name("new.gguf")
    shutil.copy(path, new)
    with GgufFile.open(path) as gguf:
        gguf.guard()
        os.utime(path)
        path.chmod(0o400)
        assert not lost(gguf, 0.1)
        assert caplog.text.count("m.gguf was touched") == 1
        path.rename(path.with_name("old.gguf"))
        os.truncate(new, 5000)
        new.rename(path)
        assert not lost(gguf, 0.1)
        path.unlink()
        assert not lost(gguf, 0.1)
    assert caplog.text.count("touched") == 1


def test_a_file_that_was_replaced_before_it_is_guarded(path: Path) -> None:
    shard = Shard(path)
    shutil.copy(path, path.with_name("new.gguf"))
    path.with_name("new.gguf").rename(path)
    with pytest.raises(GgufError, match="was replaced"):
        shard.guard()
    shard.close()
