"""What every test gets."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Several processes of tests share the cores. Threads of torch and numpy would wait for each other by
# spinning, at three times the time of the processor; and one thread adds in one order. Read at their import.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Without a GPU, Triton interprets its kernels. It looks here when it is first imported, by whichever test.
if not any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/dxg")):
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def own_state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A state folder of the tests' own: a daemon that is tried here leaves no record for the user's."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("state")
        patch.setitem(os.environ, "XDG_STATE_HOME", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """A command that is tried in this process sets up the log of the process; the next test has its own."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in set(root.handlers).difference(handlers):
        handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)
