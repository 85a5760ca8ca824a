"""Waiting in a coroutine for what another task, thread or process brings about. A bound on how soon would
test how busy the machine is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import monotonic
from typing import Any

_PATIENCE = 60.0  # seconds, for what never happens


async def until(condition: Callable[[], bool]) -> None:
    """Returns as soon as `condition` holds."""
    deadline = monotonic() + _PATIENCE
    while not condition():
        assert monotonic() < deadline, "it never happened"
        await asyncio.sleep(0.005)


async def idle(engine: Any) -> None:
    """Returns as soon as `engine` has no sequence left, and all of its pages."""
    await until(lambda: not engine.status().running and not engine.status().waiting)
    status = engine.status()
    assert status.pages_free == status.pages_total
