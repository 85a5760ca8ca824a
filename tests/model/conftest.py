"""Models shared by the tests of this folder."""

from __future__ import annotations

import pytest

from ktd_kernels import Cpu


@pytest.fixture(scope="session")
def cpu() -> Cpu:
    return Cpu(threads=1)  # these models are too small to gain from more
