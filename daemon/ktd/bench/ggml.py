"""llama.cpp's matrix product on our own blocks, through the libraries that llama-cpp-python ships."""

from __future__ import annotations

import ctypes
import importlib.util
import platform
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ktd.errors import UserError

_F32 = 0  # GGML_TYPE_F32
_NODE_OVERHEAD = 4096  # bytes a tensor's header takes in a context, rounded up generously
_GRAPH_BYTES = 1 << 20
# ggml takes scratch from the context at each run: the quantised activations, at most the size of the float
# ones, and something for each thread. Memory that is not touched costs nothing.
_MOST_RUNS = 40
_SCRATCH_BYTES = 1 << 20


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def _library_folder(given: Path | None) -> Path:
    """The folder with libggml-cpu: `given`, or that of an importable llama_cpp."""
    if given is not None:
        found = sorted(given.rglob("libggml-cpu.so"))
        if not found:
            raise UserError(f"There is no libggml-cpu.so under {given}: give the folder of llama_cpp/lib.")
        return found[0].parent
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise UserError(
            "llama_cpp is not installed here: install llama-cpp-python in any environment and give that "
            "environment's folder with --peer-lib."
        )
    return _library_folder(Path(spec.origin).parent)


class Ggml:
    """The functions of ggml that a product needs, with their C types; `folder` as for `--peer-lib`."""

    def __init__(self, folder: Path | None) -> None:
        if platform.system() != "Linux":
            raise UserError("--against llama.cpp works on Linux only.")
        where = _library_folder(folder)
        try:
            base = ctypes.CDLL(str(where / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
            cpu = ctypes.CDLL(str(where / "libggml-cpu.so"), mode=ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise UserError(f"llama.cpp's libraries in {where} do not load: {error}.") from error
        pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        self.init = self._bind(base, "ggml_init", pointer, _InitParams)
        self.free = self._bind(base, "ggml_free", None, pointer)
        self.set_no_alloc = self._bind(base, "ggml_set_no_alloc", None, pointer, ctypes.c_bool)
        self.new_2d = self._bind(base, "ggml_new_tensor_2d", pointer, pointer, integer, size, size)
        self.data = self._bind(base, "ggml_get_data", pointer, pointer)
        self.mul_mat = self._bind(base, "ggml_mul_mat", pointer, pointer, pointer, pointer)
        self.new_graph = self._bind(base, "ggml_new_graph", pointer, pointer)
        self.expand = self._bind(base, "ggml_build_forward_expand", None, pointer, pointer)
        self.wrap = self._bind(base, "ggml_backend_cpu_buffer_from_ptr", pointer, pointer, ctypes.c_size_t)
        self.place = self._bind(base, "ggml_backend_tensor_alloc", integer, pointer, pointer, pointer)
        self.unwrap = self._bind(base, "ggml_backend_buffer_free", None, pointer)
        self.compute = self._bind(cpu, "ggml_graph_compute_with_ctx", integer, pointer, pointer, integer)
        self._bind(cpu, "ggml_cpu_init", None)()

    @staticmethod
    def _bind(
        library: ctypes.CDLL, name: str, result: object, *arguments: object
    ) -> ctypes._NamedFuncPointer:
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
        return function  # type: ignore[no-any-return]


class Products:
    """Products of x [n, cols] with matrices of `stack` [count, bytes]: one graph for each list in `rounds`.

    `run` may be called up to 40 times. Close it to free its memory.
    """

    def __init__(
        self,
        ggml: Ggml,
        stack: NDArray[np.uint8],
        ggml_type: int,
        shape: tuple[int, int],
        x: NDArray[np.float32],
        rounds: Sequence[Sequence[int]],
        threads: int,
    ) -> None:
        rows, cols = shape
        self._ggml, self._threads, self._shape = ggml, threads, (x.shape[0], rows)
        out_bytes = 4 * rows * x.shape[0] + 2 * _NODE_OVERHEAD
        memory = sum(map(len, rounds)) * out_bytes + len(rounds) * _GRAPH_BYTES
        memory += x.nbytes + _MOST_RUNS * (x.nbytes + (1 + threads) * _SCRATCH_BYTES)
        self._buffer = ggml.wrap(stack.ctypes.data, stack.nbytes)
        self._context = ggml.init(_InitParams(memory, None, False))
        inputs = ggml.new_2d(self._context, _F32, cols, x.shape[0])
        ctypes.memmove(ggml.data(inputs), x.ctypes.data, x.nbytes)
        self._graphs = []
        self._lasts = []
        for picks in rounds:
            graph = ggml.new_graph(self._context)
            for pick in picks:
                ggml.set_no_alloc(self._context, True)
                matrix = ggml.new_2d(self._context, ggml_type, cols, rows)
                ggml.set_no_alloc(self._context, False)
                ggml.place(self._buffer, matrix, stack[pick].ctypes.data)
                product = ggml.mul_mat(self._context, matrix, inputs)
                ggml.expand(graph, product)
            self._graphs.append(graph)
            self._lasts.append(product)

    def run(self, number: int) -> None:
        """Compute the products of round `number`."""
        self._ggml.compute(self._context, self._graphs[number], self._threads)

    def last(self, number: int) -> NDArray[np.float32]:
        """The product of the last pick of round `number`, [n, rows]; run it first."""
        n, rows = self._shape
        raw = ctypes.string_at(self._ggml.data(self._lasts[number]), 4 * n * rows)
        return np.frombuffer(raw, np.float32).reshape(n, rows)

    def close(self) -> None:
        """Free the graphs and their results."""
        self._ggml.free(self._context)
        self._ggml.unwrap(self._buffer)
