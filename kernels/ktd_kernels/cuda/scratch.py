"""Device buffers that ops reuse, so that a captured call allocates nothing and its addresses stay valid."""

from __future__ import annotations

import math

import torch

_buffers: dict[tuple[str, torch.device, int, int], torch.Tensor] = {}


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """An uninitialised tensor, the same memory for the same name, stream and size class.

    Valid until the next call with this name on the same stream. Buffers are never freed: graphs hold their
    addresses.
    """
    size = max(math.prod(shape) * dtype.itemsize, 256)
    size_class = 1 << (size - 1).bit_length()
    key = (name, device, torch.cuda.current_stream(device).cuda_stream, size_class)
    if key not in _buffers:
        _buffers[key] = torch.empty(size_class, dtype=torch.uint8, device=device)
    return _buffers[key][: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
