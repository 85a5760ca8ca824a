"""Weights on the device from the layouts of the CPU kernels: what is streamed is what the CPU computes
with."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from gguf import GGMLQuantizationType as Q

from ktd_kernels.cuda import kernels
from ktd_kernels.cuda.driver import Module
from ktd_kernels.cuda.weight import GpuWeight, architecture, launch_over

_GROUP_ROWS, _BLOCK = 16, 256

#: Bytes of 16 rows x 256 columns for each layout and tensor type that can be unpacked here: the structs of
#: unpack.cuh. Layouts have their names from ktd_kernels.Weight.layout.
LAYOUTS: dict[tuple[str, int], int] = {
    ("trits", Q.IQ1_S): 928,
    ("trits", Q.IQ1_M): 1056,
    ("grid", Q.IQ2_XXS): 1120,
    ("grid", Q.IQ2_XS): 1248,
    ("halves", Q.IQ2_S): 1568,
    ("grid", Q.IQ3_XXS): 1632,
    ("grid", Q.IQ3_S): 1760,
}


def readable(layout: str, ggml_type: int) -> bool:
    """Whether `weight_of` takes bytes of this tensor type in this layout."""
    return layout == "file" or (layout, ggml_type) in LAYOUTS


class UnpackArgs(ctypes.Structure):
    """UnpackArgs of unpack.cuh."""

    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_uint64) for name in ("matrix_bytes", "blocks")),
        *((name, ctypes.c_uint32) for name in ("packed_blocks", "rows", "row_blocks", "matrix_groups")),
    )


def unpack_args(
    layout: str, ggml_type: int, shape: Sequence[int], nbytes: int, matrix_bytes: int
) -> UnpackArgs:
    """What the kernel is told of `nbytes` packed bytes, without addresses. Raises ValueError for a layout
    that is not known here and for bytes that do not fit the shape."""
    if (layout, ggml_type) not in LAYOUTS:
        raise ValueError(f"tensor type {ggml_type} in the layout '{layout}' cannot be unpacked on a GPU")
    matrices, (rows, cols) = (shape[0] if len(shape) == 3 else 1), shape[-2:]
    groups, row_blocks = -(-rows // _GROUP_ROWS), cols // _BLOCK
    blocks = matrices * groups * row_blocks
    if nbytes != blocks * LAYOUTS[layout, ggml_type]:
        raise ValueError(
            f"{matrices} matrices {rows} x {cols} take {blocks * LAYOUTS[layout, ggml_type]} bytes in the "
            f"layout '{layout}', not {nbytes}"
        )
    return UnpackArgs(None, None, matrix_bytes, rows * row_blocks, blocks, rows, row_blocks, groups)


def weight_of(data: torch.Tensor, layout: str, ggml_type: int, shape: Sequence[int]) -> GpuWeight:
    """The weight whose bytes in a layout of ktd_kernels.Weight are `data`; the other arguments as of
    GpuWeight. Packed bytes start at a multiple of 16. Runs on torch's current stream."""
    if layout == "file":
        return GpuWeight(data, ggml_type, shape)
    weight = GpuWeight.empty(ggml_type, shape, data.device)
    unpack(data, layout, weight)
    return weight


def unpack(data: torch.Tensor, layout: str, weight: GpuWeight) -> None:
    """Fills `weight` from its bytes in a packed layout, as `weight_of` does."""
    if data.dtype != torch.uint8 or not data.is_cuda or not data.is_contiguous() or data.data_ptr() % 16:
        raise TypeError(
            "packed bytes must be a contiguous uint8 tensor on a CUDA device, aligned to 16 bytes"
        )
    arguments = unpack_args(layout, weight.ggml_type, weight.shape, data.numel(), weight.matrix_bytes)
    arguments.packed, arguments.out = data.data_ptr(), weight.data.data_ptr()
    with torch.cuda.device(weight.index):
        kernel = _module(weight.ggml_type, weight.index).function("unpack")
        launch_over(kernel, weight.index, arguments.packed_blocks * _GROUP_ROWS, arguments)


@functools.cache
def _module(ggml_type: int, device: int) -> Module:
    with torch.cuda.device(device):
        return Module(kernels.unpack_cubin(ggml_type, architecture(device)))
