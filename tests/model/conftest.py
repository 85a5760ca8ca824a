"""Models shared by the tests of this folder."""

from __future__ import annotations

import pytest

from ktd.model.rehearsal import Rehearsal
from ktd_kernels import Cpu


@pytest.fixture(scope="session")
def cpu() -> Cpu:
    return Cpu(threads=1)  # these models are too small to gain from more


@pytest.fixture(autouse=True)
def in_two_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several drawn rows come in two parts, as if that had been measured to be the faster."""
    monkeypatch.setattr(Rehearsal, "_seconds_in_parts", lambda self, n: {1: 2.0, 2: 1.0})
