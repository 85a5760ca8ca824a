"""Modules and launches through the CUDA driver API, by ctypes, in the context and stream that torch uses."""

from __future__ import annotations

import ctypes
import functools

import torch

#: What a kernel takes by value.
Argument = ctypes.Structure | ctypes.c_uint64 | ctypes.c_void_p

_INVALID_CONTEXT = 201


class DriverError(RuntimeError):
    """A call of the CUDA driver failed."""


@functools.cache
def _driver() -> ctypes.CDLL:
    for name in ("libcuda.so.1", "libcuda.so", "nvcuda.dll"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.cuGetErrorString.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
        return library
    raise DriverError("The NVIDIA driver (libcuda) is missing; install it, or run without a GPU.")


def _check(result: int, call: str) -> None:
    if result:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(result, ctypes.byref(text))
        raise DriverError(f"{call} failed: {(text.value or b'unknown error').decode()} ({result}).")


class Module:
    """A loaded cubin; its kernels run on the device that was current when it was loaded."""

    def __init__(self, cubin: bytes) -> None:
        """Load `cubin` into torch's context of the current device; raises DriverError."""
        torch.cuda.current_stream()  # makes torch create its context
        torch.cuda.synchronize()
        self._device = torch.cuda.current_device()
        self._handle = ctypes.c_void_p()
        _check(_driver().cuModuleLoadData(ctypes.byref(self._handle), cubin), "cuModuleLoadData")
        self._functions: dict[str, Function] = {}

    def function(self, name: str) -> Function:
        """The kernel `name`; raises DriverError where the module has none."""
        if name not in self._functions:
            handle = ctypes.c_void_p()
            _check(
                _driver().cuModuleGetFunction(ctypes.byref(handle), self._handle, name.encode()),
                f"cuModuleGetFunction({name})",
            )
            self._functions[name] = Function(name, handle, self._device)
        return self._functions[name]


class TensorMap(ctypes.Structure):
    """CUtensorMap: how the tensor memory accelerator sees a matrix."""

    _fields_ = (("words", ctypes.c_uint64 * 16),)


def matrix_map(address: int, rows: int, columns: int, box: tuple[int, int]) -> TensorMap:
    """Of bfloat16 [rows, columns] at `address`, read in boxes of (rows, columns) whose rows of 128 bytes are
    swizzled. Raises DriverError."""
    room = (ctypes.c_uint8 * 192)()
    found = TensorMap.from_buffer(room, -ctypes.addressof(room) % 64)
    bfloat16, none, swizzle_128, promote_256 = 9, 0, 3, 3
    result = _driver().cuTensorMapEncodeTiled(
        ctypes.byref(found), bfloat16, 2, ctypes.c_void_p(address),
        (ctypes.c_uint64 * 2)(columns, rows), (ctypes.c_uint64 * 1)(columns * 2),
        (ctypes.c_uint32 * 2)(box[1], box[0]), (ctypes.c_uint32 * 2)(1, 1),
        none, swizzle_128, promote_256, none,
    )  # fmt: skip
    _check(result, "cuTensorMapEncodeTiled")
    return found


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_uint8 * 64))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


# The kernel may start before the one ahead of it in the stream has ended (wait_for_previous in formats.cuh).
_EARLY = _Attribute(6)
_EARLY.value[0] = 1


class Function:
    """One kernel."""

    def __init__(self, name: str, handle: ctypes.c_void_p, device: int) -> None:
        self._name = name
        self._device = device
        self._handle = handle
        self._occupancy: dict[int, int] = {}
        self._early = torch.cuda.get_device_capability(device) >= (9, 0)

    def resident(self, threads: int) -> int:
        """Blocks of `threads` threads that one multiprocessor holds at a time."""
        if threads not in self._occupancy:
            count = ctypes.c_int()
            _check(
                _driver().cuOccupancyMaxActiveBlocksPerMultiprocessor(
                    ctypes.byref(count), self._handle, threads, ctypes.c_size_t(0)
                ),
                "cuOccupancyMaxActiveBlocksPerMultiprocessor",
            )
            self._occupancy[threads] = max(count.value, 1)
        return self._occupancy[threads]

    def allow_shared(self, nbytes: int) -> None:
        """Blocks may take `nbytes` of dynamic shared memory, more than the 48 KiB that any kernel may."""
        limit = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(_driver().cuFuncSetAttribute(self._handle, limit, nbytes), "cuFuncSetAttribute")

    def launch(
        self,
        grid: tuple[int, int] | tuple[int, int, int],
        threads: int,
        *arguments: Argument,
        shared: int = 0,
    ) -> None:
        """Queue `grid` (x, y, z) blocks of `threads` threads and `shared` bytes of dynamic shared memory on
        the device's current stream."""
        if torch.cuda.current_device() != self._device:
            with torch.cuda.device(self._device):
                self.launch(grid, threads, *arguments, shared=shared)
            return
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        blocks = (*grid, 1)[:3]
        config = _Config(blocks, (threads, 1, 1), shared, torch.cuda.current_stream().cuda_stream)
        if self._early:
            config.attributes, config.count = ctypes.pointer(_EARLY), 1
        launch = _driver().cuLaunchKernelEx
        result = launch(ctypes.byref(config), self._handle, pointers, None)
        if result == _INVALID_CONTEXT:  # a thread that has not used CUDA yet
            torch.cuda.synchronize()
            result = launch(ctypes.byref(config), self._handle, pointers, None)
        _check(result, f"cuLaunchKernelEx({self._name})")
