"""Device memory that the ops reuse: taken at the first call of a shape, so a later capture allocates nothing.

There is one piece a device and name: calls on one device must be ordered, by one stream or by events. A graph
may hold the address of a piece that became too small, so none is freed; call the largest shape first.
"""

from __future__ import annotations

import math

import torch

_pieces: dict[tuple[str, torch.device], list[torch.Tensor]] = {}


def scratch(name: str, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Uninitialised float32 [shape]; the same memory at every call with this name."""
    values = math.prod(shape)
    pieces = _pieces.setdefault((name, device), [])
    if not pieces or pieces[-1].numel() < values:
        pieces.append(torch.empty(values, dtype=torch.float32, device=device))
    return pieces[-1][:values].view(shape)
