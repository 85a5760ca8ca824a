"""How much memory a model may use: what the settings ask for, or what is free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from ktd.gpu import Gpu

# Left to the system and to the Python process (torch, tokenizer, servers) when no budget is given.
_RESERVE = 1 << 30
# Left to other programs on the GPU, the desktop among them.
_VRAM_RESERVE = 512 << 20


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes that may be used: of memory, and of each GPU by its name ("cuda:0"; none: no GPU is used).

    `optional`: nobody asked for the GPUs, so those that are too small for the model stay unused.
    """

    ram: int
    vram: Mapping[str, int] = field(default_factory=dict)
    optional: bool = False


def budget_of(ram: int | None, vram: Sequence[int] | None, gpus: Sequence[Gpu]) -> Budget:
    """The budgets that settings ask for; what they leave open is what is free now, less a reserve. `gpus` are
    those of `gpus_for` with the same `vram`."""
    ram = ram if ram is not None else max(available_memory() - _RESERVE, 0)
    if vram is None:
        free = {gpu.device: max(gpu.free - _VRAM_RESERVE, 0) for gpu in gpus}
        return Budget(ram, free, optional=bool(gpus))
    asked = [size for size in vram if size]
    sizes = asked * len(gpus) if len(vram) == 1 else asked
    return Budget(ram, {gpu.device: size for gpu, size in zip(gpus, sizes, strict=True)})


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
