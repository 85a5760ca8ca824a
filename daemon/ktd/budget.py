"""How much memory a model may use: what the settings ask for, or what is free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

from ktd.gpu import Gpu

# Left to the system and to the Python process (torch, tokenizer, servers) when no budget is given.
_RESERVE = 1 << 30
# Left to other programs on the GPU, the desktop among them.
_VRAM_RESERVE = 512 << 20


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes that may be used: of memory, and of the GPU `device` ("cuda:0"; None: no GPU is used).

    `optional`: nobody asked for the GPU, so where it is too small for the model it stays unused.
    """

    ram: int
    vram: int = 0
    device: str | None = None
    optional: bool = False


def budget_of(ram: int | None, vram: int | None, gpu: Gpu | None) -> Budget:
    """The budgets that settings ask for; what they leave open is what is free now, less a reserve."""
    ram = ram if ram is not None else max(available_memory() - _RESERVE, 0)
    if gpu is None:
        return Budget(ram)
    if vram is None:
        return Budget(ram, max(gpu.free - _VRAM_RESERVE, 0), gpu.device, optional=True)
    return Budget(ram, vram, gpu.device)


def available_memory() -> int:
    """Bytes this process may still take: the smaller of what the system and its cgroup have left."""
    available = psutil.virtual_memory().available
    limit = _number(Path("/sys/fs/cgroup/memory.max"))
    used = _number(Path("/sys/fs/cgroup/memory.current"))
    if limit is not None and used is not None:
        available = min(available, max(limit - used, 0))
    return available


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such cgroup file, or "max"
        return None
