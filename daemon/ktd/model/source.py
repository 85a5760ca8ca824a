"""Tensors of a GGUF as weights of the kernels, checked by name and shape: mapped for the CPU, or copied to a
GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import psutil

from ktd.errors import GgufError
from ktd.gguf import WEIGHT_TYPES, GgmlType, TensorInfo
from ktd.model.device import Device
from ktd.model.ops import Array, Matrix
from ktd.model.sidecar import Sidecar, key_of
from ktd_kernels import Cpu, Weight

_TOUCH_BYTES = 64 << 20  # progress is told this often while pages are read in
_PAGE = 4096
F32 = npt.NDArray[np.float32]


class Tensors(Protocol):
    """Blocks of tensors by name: a GgufFile, whose docstrings say more, or what stands in for one."""

    @property
    def name(self) -> str: ...

    @property
    def nbytes(self) -> int: ...

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def data(self, name: str) -> npt.NDArray[np.uint8]: ...

    def release(self, name: str) -> None: ...


class WeightSource:
    """Hands out each tensor once and tells how far the loading is.

    Where the whole file fits into free memory its pages are read in as tensors are taken, so that the first
    answer does not wait for the disk; else they are left to be read when first used.

    With `packer`, matrices of the types that it packs become copies in its layout, unless `sidecar` keeps
    them from an earlier load. Of these and of what went to a device the file's pages are given back to the
    system: never both stay in memory.
    """

    def __init__(
        self,
        gguf: Tensors,
        progress: Callable[[float], None],
        packer: Cpu | None = None,
        sidecar: Sidecar | None = None,
    ) -> None:
        self._gguf = gguf
        self._packer = packer
        self._sidecar = sidecar or Sidecar()
        self._target: Device | None = None
        self.areas: list[tuple[int, int]] = []  # address and bytes of what was handed out for the CPU
        self.sliced: list[Weight] = []  # what nodes of memory share of that
        self._told = _Told(progress, max(gguf.nbytes, 1))
        self._told.done = sum(gguf.tensors[name].nbytes for name in self._sidecar.ready)
        self._touch = gguf.nbytes <= psutil.virtual_memory().available

    def on(self, target: Device) -> WeightSource:
        """The same file and the same progress, but what is handed out lies on `target`."""
        source = WeightSource(self._gguf, self._told.progress)
        source._target = target
        source._told = self._told
        return source

    @property
    def sendable(self) -> bool:
        """Whether `blocks` are there, to be sent to a GPU for a step."""
        return True

    def has(self, name: str) -> bool:
        return name in self._gguf.tensors

    def vector(self, name: str, length: int) -> Array:
        """A norm weight or bias, float32 [length], copied."""
        info = self._info(name, (length,))
        vector = Weight(self._data(name), int(info.ggml_type), (1, length)).dequantize().reshape(length)
        return vector if self._target is None else self._target.upload(vector)

    def matrix(self, name: str, rows: int, cols: int) -> Matrix:
        """A linear layer [rows, cols], mapped or packed."""
        return self._whole(name, (rows, cols))

    def stack(self, name: str, count: int, rows: int, cols: int, *, sliced: bool = False) -> Matrix:
        """One matrix for each expert or head, [count, rows, cols], mapped or packed; `sliced`: nodes of
        memory may share what is packed, see `Cpu.pack`."""
        return self._whole(name, (count, rows, cols), sliced)

    def blocks(self, name: str, count: int, rows: int, cols: int) -> Weight:
        """A stack as it lies in the file, mapped; not read."""
        shape = (count, rows, cols)
        return Weight(self._gguf.data(name), int(self._info(name, shape).ggml_type), shape)

    def halves(
        self, name: str, count: int, rows: int, cols: int, *, sliced: bool = False
    ) -> tuple[Matrix, Matrix]:
        """The upper and the lower `rows` rows of each matrix of [count, 2 · rows, cols], as two stacks,
        copied; `sliced` as of `stack`."""
        info = self._info(name, (count, 2 * rows, cols))
        blocks = self._gguf.data(name).reshape(count, 2, -1)

        def half(number: int) -> Matrix:
            def copy() -> npt.NDArray[np.uint8]:
                return np.ascontiguousarray(blocks[:, number]).reshape(-1)

            key = key_of(name, ("upper", "lower")[number])
            return self._weight(key, copy, int(info.ggml_type), (count, rows, cols), sliced)

        both = half(0), half(1)
        self._passed(name)
        return both

    def split_kv_b(self, name: str, heads: int, nope: int, value: int, kv_lora: int) -> tuple[Matrix, Matrix]:
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
        v_b = self._weight(key_of(name, "v"), lambda: v_blocks, int(info.ggml_type), (heads, value, kv_lora))
        k = Weight(k_blocks, int(info.ggml_type), (heads, nope, kv_lora)).dequantize()
        transposed = np.ascontiguousarray(k.transpose(0, 2, 1))
        k_b, kind = _float_blocks(transposed, info.ggml_type)
        return self._weight(key_of(name, "k"), lambda: k_b, kind, transposed.shape), v_b

    def _whole(self, name: str, shape: tuple[int, ...], sliced: bool = False) -> Matrix:
        kind = int(self._info(name, shape).ggml_type)
        if self._target is None and not self._packs(kind, shape):
            return self._kept(Weight(self._data(name), kind, shape))
        weight = self._weight(key_of(name), lambda: self._gguf.data(name), kind, shape, sliced)
        self._passed(name)
        return weight

    def _passed(self, name: str) -> None:
        """What a tensor's blocks were needed for is done."""
        self._gguf.release(name)
        if name not in self._sidecar.ready:
            self._told.more(self._gguf.tensors[name].nbytes)

    def _weight(
        self,
        key: str,
        blocks: Callable[[], npt.NDArray[np.uint8]],
        kind: int,
        shape: Sequence[int],
        sliced: bool = False,
    ) -> Matrix:
        if self._target is not None:
            return self._target.weight(blocks(), kind, shape)
        if self._packer is None or not self._packs(kind, shape):
            return self._kept(Weight(blocks(), kind, shape))
        kept = self._sidecar.get(key, kind, shape)
        if kept is None:
            sliced = sliced and not self._sidecar.keeps
            kept = self._sidecar.put(key, self._packer.pack(Weight(blocks(), kind, shape), sliced=sliced))
        return self._kept(kept)

    def _kept(self, weight: Weight) -> Weight:
        self.areas.append((weight.bytes.ctypes.data, weight.nbytes))
        if len(weight.slices) > 1:
            self.sliced.append(weight)
        return weight

    def _packs(self, kind: int, shape: Sequence[int]) -> bool:
        return self._packer is not None and self._packer.packed_bytes(kind, shape) > 0

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
            self._told.more(part.size)
        return data


class _Told:
    """How much of a file was taken, by all sources of it together."""

    def __init__(self, progress: Callable[[float], None], total: int) -> None:
        self.progress = progress
        self._total = total
        self.done = 0

    def more(self, size: int) -> None:
        self.done += size
        self.progress(min(self.done / self._total, 1.0))


def _float_blocks(values: F32, like: GgmlType) -> tuple[npt.NDArray[np.uint8], int]:
    """Bytes and type of `values`: `like` where that is F32 or BF16 (exact: the values come from it), else
    F16."""
    if like == GgmlType.F32:
        return values.reshape(-1).view(np.uint8), int(GgmlType.F32)
    if like == GgmlType.BF16:
        bits = (values.reshape(-1).view(np.uint32) >> 16).astype(np.uint16)
        return bits.view(np.uint8), int(GgmlType.BF16)
    return values.reshape(-1).astype(np.float16).view(np.uint8), int(GgmlType.F16)


def _text(shape: tuple[int, ...]) -> str:
    return " x ".join(str(size) for size in reversed(shape))
