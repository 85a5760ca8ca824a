"""Tensors of a GGUF as weights of the kernels, checked by name and shape, without copying them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import psutil

from ktd.errors import GgufError
from ktd.gguf import WEIGHT_TYPES, GgmlType, GgufFile, TensorInfo
from ktd_kernels import Cpu, Weight

_TOUCH_BYTES = 64 << 20  # progress is told this often while pages are read in
_PAGE = 4096
F32 = npt.NDArray[np.float32]


class WeightSource:
    """Hands out each tensor once and tells how far the loading is.

    Where the whole file fits into free memory its pages are read in as tensors are taken, so that the first
    answer does not wait for the disk; else they are left to be read when first used.

    With `packer`, matrices of the types that it packs become copies in its layout, and the file's pages are
    given back to the system: never both stay in memory.
    """

    def __init__(self, gguf: GgufFile, progress: Callable[[float], None], packer: Cpu | None = None) -> None:
        self._gguf = gguf
        self._progress = progress
        self._packer = packer
        self._total = max(gguf.nbytes, 1)
        self._done = 0
        self._touch = self._total <= psutil.virtual_memory().available

    def has(self, name: str) -> bool:
        return name in self._gguf.tensors

    def vector(self, name: str, length: int) -> F32:
        """A norm weight or bias, float32 [length], copied."""
        info = self._info(name, (length,))
        vector: F32 = Weight(self._data(name), int(info.ggml_type), (1, length)).dequantize().reshape(length)
        return vector

    def matrix(self, name: str, rows: int, cols: int) -> Weight:
        """A linear layer [rows, cols], mapped or packed."""
        return self._weight(name, (rows, cols))

    def stack(self, name: str, count: int, rows: int, cols: int) -> Weight:
        """One matrix for each expert or head, [count, rows, cols], mapped or packed."""
        return self._weight(name, (count, rows, cols))

    def halves(self, name: str, count: int, rows: int, cols: int) -> tuple[Weight, Weight]:
        """The upper and the lower `rows` rows of each matrix of [count, 2 · rows, cols], as two stacks,
        copied."""
        info = self._info(name, (count, 2 * rows, cols))
        blocks = self._data(name).reshape(count, 2, -1)
        upper, lower = (np.ascontiguousarray(blocks[:, half]).reshape(-1) for half in (0, 1))
        shape = (count, rows, cols)
        self._gguf.release(name)
        return (
            self._packed(Weight(upper, int(info.ggml_type), shape)),
            self._packed(Weight(lower, int(info.ggml_type), shape)),
        )

    def split_kv_b(self, name: str, heads: int, nope: int, value: int, kv_lora: int) -> tuple[Weight, Weight]:
        """k_b [heads, kv_lora, nope] and v_b [heads, value, kv_lora] out of kv_b [heads · (nope + value),
        kv_lora].

        V keeps its blocks. K must be transposed across block boundaries: a float type stays what it is, a
        quantised one becomes F16, whose rounding (2^-12) is far below that of int8 activations (2^-8).
        """
        info = self._info(name, (heads * (nope + value), kv_lora))
        data = self._data(name)
        per_head = data.reshape(heads, nope + value, -1)
        v_blocks = np.ascontiguousarray(per_head[:, nope:]).reshape(-1)
        k_blocks = np.ascontiguousarray(per_head[:, :nope]).reshape(-1)
        v_b = Weight(v_blocks, int(info.ggml_type), (heads, value, kv_lora))
        k = Weight(k_blocks, int(info.ggml_type), (heads, nope, kv_lora)).dequantize()
        return _float_weight(np.ascontiguousarray(k.transpose(0, 2, 1)), info.ggml_type), v_b

    def _weight(self, name: str, shape: tuple[int, ...]) -> Weight:
        info = self._info(name, shape)
        if self._packer is None or not self._packer.packed_bytes(int(info.ggml_type), shape):
            return Weight(self._data(name), int(info.ggml_type), shape)
        packed = self._packer.pack(Weight(self._gguf.data(name), int(info.ggml_type), shape))
        self._gguf.release(name)
        self._advance(info.nbytes)
        return packed

    def _packed(self, weight: Weight) -> Weight:
        packer = self._packer
        if packer is None or not packer.packed_bytes(weight.ggml_type, weight.shape):
            return weight
        return packer.pack(weight)

    def _info(self, name: str, shape: tuple[int, ...]) -> TensorInfo:
        info = self._gguf.tensors.get(name)
        if info is None:
            raise GgufError(
                f"{self._gguf.name} lacks the tensor {name}: it is not a complete model, download it again"
            )
        if info.shape != shape:
            raise GgufError(
                f"{self._gguf.name}: tensor {name} has shape {_text(info.shape)} where the metadata asks for"
                f" {_text(shape)}; the file is damaged or was made by a faulty converter, take another"
            )
        if info.ggml_type not in WEIGHT_TYPES:
            raise GgufError(
                f"{self._gguf.name}: tensor {name} is of type {info.ggml_type.name}, which ktd cannot"
                " multiply; take a quant with standard types"
            )
        return info

    def _data(self, name: str) -> npt.NDArray[np.uint8]:
        data = self._gguf.data(name)
        for start in range(0, data.size, _TOUCH_BYTES):
            part = data[start : start + _TOUCH_BYTES]
            if self._touch:
                part[::_PAGE].max()
            self._advance(part.size)
        return data

    def _advance(self, nbytes: int) -> None:
        self._done += nbytes
        self._progress(min(self._done / self._total, 1.0))


def _float_weight(values: F32, like: GgmlType) -> Weight:
    """A weight of type `like` where that is F32 or BF16 (exact: the values come from it), else of type
    F16."""
    if like == GgmlType.F32:
        return Weight(values.reshape(-1).view(np.uint8), int(GgmlType.F32), values.shape)
    if like == GgmlType.BF16:
        bits = (values.reshape(-1).view(np.uint32) >> 16).astype(np.uint16)
        return Weight(bits.view(np.uint8), int(GgmlType.BF16), values.shape)
    half = values.reshape(-1).astype(np.float16)
    return Weight(half.view(np.uint8), int(GgmlType.F16), values.shape)


def _text(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in reversed(shape))
