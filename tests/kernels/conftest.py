"""Every kernel test runs on every instruction set that this CPU has."""

from __future__ import annotations

import pytest

from ktd_kernels import Cpu, isa_list


@pytest.fixture(params=isa_list())
def isa(request: pytest.FixtureRequest) -> str:
    """The name of one instruction set."""
    return str(request.param)


@pytest.fixture
def cpu(isa: str) -> Cpu:
    """Three threads, one more than the smallest CI machine has cores, so that work is really split."""
    return Cpu(threads=3, isa=isa)
