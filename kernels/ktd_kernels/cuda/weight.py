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
        self._lay_out(ggml_type, shape, data.device)
        self._check_bytes(data, self.matrices)
        if self.format.coded:
            self.data = torch.empty(self._size, dtype=torch.uint8, device=self.device)
            self.load(data)
        else:
            self.data = data if data.data_ptr() % _ALIGNMENT == 0 else data.clone()

    @classmethod
    def empty(
        cls, ggml_type: int, shape: Sequence[int], device: torch.device, room: torch.Tensor | None = None
    ) -> GpuWeight:
        """Memory for a weight that `load` fills, matrix by matrix: a buffer for streamed experts. `room`:
        where it is to lie, uint8 [bytes or more], from a multiple of 16 on."""
        self = cls.__new__(cls)
        self._lay_out(ggml_type, shape, device)
        if room is None:
            room = torch.empty(self._size, dtype=torch.uint8, device=self.device)
        self.data = room[: self._size]
        return self

    def load(self, data: torch.Tensor, first: int = 0) -> None:
        """Matrices from `first` on from their blocks as they lie in the file, on torch's current stream.

        data: uint8 CUDA tensor [bytes], contiguous, whole matrices; any alignment.
        """
        count = data.numel() // self._raw
        self._check_bytes(data, count)
        if count < 1 or not 0 <= first <= self.matrices - count:
            raise ValueError(f"{count} matrices from {first} on do not lie within {self.matrices}")
        out = self.data[first * self.matrix_bytes : (first + count) * self.matrix_bytes]
        if not self.format.coded:
            out.copy_(data)
            return
        with torch.cuda.device(self.index):
            launch_over(
                product_module(self.ggml_type, self.index).function("repack"),
                self.index,
                count * self.rows * self.cols // 32,
                ctypes.c_void_p(data.data_ptr()),
                ctypes.c_void_p(out.data_ptr()),
                ctypes.c_uint64(self.matrix_bytes),
                ctypes.c_uint64(self.blocks),
                ctypes.c_uint64(count),
            )

    def _lay_out(self, ggml_type: int, shape: Sequence[int], device: torch.device) -> None:
        self.format = _format(ggml_type)
        self.shape = tuple(int(n) for n in shape)
        _check_shape(self.format, self.shape)
        if device.type != "cuda":
            raise TypeError("a GpuWeight lies on a CUDA device; for the CPU there is ktd_kernels.Weight")
        self.index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", self.index)
        self.matrices, (self.rows, self.cols) = (self.shape[0] if len(shape) == 3 else 1), self.shape[-2:]
        self.blocks = self.rows * self.cols // self.format.block
        self._raw = self.blocks * self.format.nbytes
        padding = -self._raw % _ALIGNMENT if self.format.coded else 0
        self.matrix_bytes = self._raw + padding
        self._size = self.matrix_bytes * self.matrices

    def _check_bytes(self, data: torch.Tensor, matrices: int) -> None:
        if data.dtype != torch.uint8 or data.device != self.device or not data.is_contiguous():
            raise TypeError(f"a GpuWeight's data must be a contiguous uint8 tensor on {self.device}")
        if data.numel() != self._raw * matrices:
            raise ValueError(
                f"{matrices} matrices {self.rows} x {self.cols} of {self.format.name} take "
                f"{self._raw * matrices} bytes, not {data.numel()}"
            )

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
