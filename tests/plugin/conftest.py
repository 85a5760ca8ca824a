"""What all tests of the Pipe share."""

from __future__ import annotations

import pytest
from pipe_grpc_kit import module


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon on a busy machine may take longer to list its models than a person would wait for them."""
    monkeypatch.setattr(module, "LIST_TIMEOUT", 60.0)
