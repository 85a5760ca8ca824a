"""What `ktd doctor` looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from ktd.doctor import gpu, memory, processor, service
from ktd.doctor.check import Check
from ktd.settings import Settings

__all__ = ["Check", "all_checks"]


def all_checks(settings: Settings) -> list[Check]:
    """Every check, in the order in which they are worth reading."""
    checks: tuple[Callable[[Settings], Iterator[Check]], ...] = (
        processor.instruction_set,
        processor.cores,
        memory.nodes,
        memory.slices,
        memory.huge_pages,
        memory.bandwidth,
        memory.room,
        gpu.gpus,
        service.model,
        service.repacked,
        service.disk,
        service.ports,
        service.supervisor,
    )
    return [check for look in checks for check in look(settings)]
