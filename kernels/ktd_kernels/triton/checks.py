"""What every op checks before a launch, when contents are still on the device and only shapes can be seen."""

from __future__ import annotations

import functools
import os

import torch

#: Kernels run in Triton's interpreter, on the CPU: for tests. Its products know no bfloat16.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def early(device: torch.device) -> bool:
    """Whether kernels may be launched before the one ahead has ended (compute capability 9.0 and up): they
    wait for it with gdc_wait before they read or write anything."""
    return not INTERPRETED and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def require(
    name: str,
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    types: tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """Raises ValueError unless `tensor` has this shape, one of these types, lies on `device` and is
    contiguous in its last dimension."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, but must have {list(shape)}")
    if tensor.dtype not in types:
        raise ValueError(f"{name} is {tensor.dtype}, but must be {' or '.join(map(str, types))}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, but must be on {device} as the first argument")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension")
