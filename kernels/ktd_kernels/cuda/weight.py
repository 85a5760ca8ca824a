"""Weights on the device: the file's blocks, rearranged once at upload without loss or growth."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch

from ktd_kernels.cuda import kernels
from ktd_kernels.cuda.driver import Argument, Function, Module

_THREADS = 256
_ALIGNMENT = 16  # bytes that a matrix of a stack is padded to
_DTYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_FLOAT_DTYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}


@functools.cache
def architecture(device: int) -> int:
    """Compute capability times ten."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def processors(device: int) -> int:
    """Streaming multiprocessors of a device."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def product_module(ggml_type: int, device: int) -> Module:
    """The kernels of a tensor type on a device; compiles or loads them on the first call."""
    with torch.cuda.device(device):
        return Module(kernels.product_cubin(ggml_type, architecture(device)))


class DequantizeArgs(ctypes.Structure):
    """DequantizeArgs of quantized.cu."""

    _fields_ = (
        ("w", ctypes.c_void_p),
        ("matrix_bytes", ctypes.c_uint64),
        ("blocks", ctypes.c_uint64),
        ("out", ctypes.c_void_p),
        ("ids", ctypes.c_void_p),
        ("first_row", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("rows", ctypes.c_int),
        ("cols", ctypes.c_int),
    )


def launch_over(function: Function, device: int, items: int, *arguments: Argument) -> None:
    """Launch a grid-stride kernel over `items` threads' worth of work."""
    blocks = min((items + _THREADS - 1) // _THREADS, processors(device) * function.resident(_THREADS))
    function.launch((max(blocks, 1), 1), _THREADS, *arguments)


class GpuWeight:
    """A matrix, or a stack of them, of GGUF blocks on a CUDA device.

    data: uint8 CUDA tensor [bytes], the blocks as they lie in the file (F32, F16 and BF16 stay in it, for all
    others it may be freed afterwards); ggml_type: GGUF tensor type; shape: (rows, cols) or
    (count, rows, cols). Raises TypeError or ValueError for what does not fit together.
    """

    def __init__(self, data: torch.Tensor, ggml_type: int, shape: Sequence[int]) -> None:
        self.format = _format(ggml_type)
        self.shape = tuple(int(n) for n in shape)
        _check_shape(self.format, self.shape)
        self.matrices, (self.rows, self.cols) = (self.shape[0] if len(shape) == 3 else 1), self.shape[-2:]
        self.blocks = self.rows * self.cols // self.format.block
        raw = self.blocks * self.format.nbytes
        if data.dtype != torch.uint8 or not data.is_cuda or not data.is_contiguous():
            raise TypeError("a GpuWeight's data must be a contiguous uint8 tensor on a CUDA device")
        if data.numel() != raw * self.matrices:
            raise ValueError(
                f"{self.format.name} {list(self.shape)} takes {raw * self.matrices} bytes, not {data.numel()}"
            )
        self.device = data.device
        self.index = data.device.index
        if not self.format.coded:
            self.matrix_bytes = raw
            self.data = data if data.data_ptr() % _ALIGNMENT == 0 else data.clone()
            return
        self.matrix_bytes = -(-raw // _ALIGNMENT) * _ALIGNMENT
        self.data = torch.empty(self.matrix_bytes * self.matrices, dtype=torch.uint8, device=data.device)
        repack(data, self, self.data)

    @property
    def ggml_type(self) -> int:
        return self.format.ggml_type

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return self.data.numel()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Tensor of `shape`: bit-equal to gguf.quants.dequantize, then rounded to `dtype`."""
        out = torch.empty(self.shape, dtype=dtype, device=self.device)
        self.dequantize_rows(0, self.matrices * self.rows, out)
        return out

    def dequantize_rows(self, first: int, count: int, out: torch.Tensor) -> None:
        """Rows first .. first + count of all matrices into out [count, cols], contiguous."""
        if not self.format.coded:
            out.view(count, self.cols).copy_(self.floats().view(-1, self.cols)[first : first + count])
            return
        self._dequantize(first, count, None, out)

    def gather(self, ids: torch.Tensor, out: torch.Tensor) -> None:
        """out[i] = row ids[i], clamped to the matrix; ids int32 [n], out float32 [n, cols], contiguous."""
        if not self.format.coded:
            out.copy_(self.floats()[ids.clamp(0, self.rows - 1).long()])
            return
        self._dequantize(0, ids.numel(), ids, out)

    def floats(self) -> torch.Tensor:
        """An F32, F16 or BF16 weight as a tensor of `shape`."""
        return self.data.view(_FLOAT_DTYPES[self.ggml_type]).view(self.shape)

    def _dequantize(self, first: int, count: int, ids: torch.Tensor | None, out: torch.Tensor) -> None:
        if out.dtype not in _DTYPES or not out.is_contiguous():
            raise TypeError("weights dequantise to contiguous float32, float16 or bfloat16")
        arguments = DequantizeArgs(
            self.data.data_ptr(),
            self.matrix_bytes,
            self.blocks,
            out.data_ptr(),
            ids.data_ptr() if ids is not None else None,
            first,
            count,
            self.rows,
            self.cols,
        )
        with torch.cuda.device(self.index):
            kernel = product_module(self.ggml_type, self.index).function(f"dequantize_{_DTYPES[out.dtype]}")
            launch_over(kernel, self.index, count * self.cols // 32, arguments)


def repack(raw: torch.Tensor, w: GpuWeight, out: torch.Tensor) -> None:
    """The file's blocks `raw`, a whole number of w's matrices, into `out` in the layout of w's kernels."""
    matrices = raw.numel() // (w.blocks * w.format.nbytes)
    with torch.cuda.device(w.index):
        kernel = product_module(w.ggml_type, w.index).function("repack")
        launch_over(
            kernel,
            w.index,
            matrices * w.rows * w.cols // 32,
            ctypes.c_void_p(raw.data_ptr()),
            ctypes.c_void_p(out.data_ptr()),
            ctypes.c_uint64(w.matrix_bytes),
            ctypes.c_uint64(w.blocks),
            ctypes.c_uint64(matrices),
        )


def _format(ggml_type: int) -> kernels.Format:
    if ggml_type not in kernels.FORMATS:
        names = ", ".join(sorted(f.name for f in kernels.FORMATS.values()))
        raise ValueError(f"tensor type {ggml_type} has no GPU kernels; those that have: {names}")
    return kernels.FORMATS[ggml_type]


def _check_shape(format: kernels.Format, shape: tuple[int, ...]) -> None:
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise ValueError(f"a weight has shape (rows, cols) or (count, rows, cols), not {list(shape)}")
    unit = format.block if format.coded else 8
    if shape[-1] % unit:
        raise ValueError(f"rows of {format.name} must be a multiple of {unit} long, not {shape[-1]}")
