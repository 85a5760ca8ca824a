"""One GGUF file on disk: header, tensor table, mapping. A model is one or several of these."""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ktd.errors import GgufError
from ktd.gguf.cursor import Cursor, quoted
from ktd.gguf.formats import GgmlType, refusal
from ktd.gguf.watch import FileWatch
from ktd_kernels import ReadGuard

_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 20
# The least a key-value pair (length, one letter, type, one byte) and a tensor entry (length, one letter,
# dimension count, one dimension, type, offset) can take: bounds the counts of a damaged header.
_MIN_PAIR_BYTES = 14
_MIN_TENSOR_BYTES = 33


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor is and what it holds.

    shape is row-major, slowest dimension first (GGUF's ne reversed); rows are whole numbers of blocks.
    offset counts bytes from the start of the file `shard` (an index into GgufFile.paths).
    """

    name: str
    shape: tuple[int, ...]
    ggml_type: GgmlType
    nbytes: int
    shard: int
    offset: int


class Shard:
    """A mapped file whose header and tensor table were checked against its size."""

    def __init__(self, path: Path, index: int = 0) -> None:
        self.path = path
        self._buffer, self._opened = _map(path)
        cursor = Cursor(self._buffer, path)
        pairs, tensors = _counts(cursor, path)
        self.metadata: Mapping[str, object] = _metadata(cursor, pairs)
        self.tensors: Mapping[str, TensorInfo] = _tensors(
            cursor, tensors, index, _alignment(self.metadata, path), len(self._buffer), path
        )
        self._bytes: npt.NDArray[np.uint8] | None = np.frombuffer(self._buffer, np.uint8)
        self._guard: ReadGuard | None = None

    def data(self, tensor: TensorInfo) -> npt.NDArray[np.uint8]:
        """The tensor's blocks, uint8 [nbytes]: a read-only view of the mapping, nothing is copied."""
        if self._bytes is None:
            raise ValueError(f"{self.path} is closed")
        return self._bytes[tensor.offset : tensor.offset + tensor.nbytes]

    def release(self, tensor: TensorInfo) -> None:
        """Gives the pages that hold nothing but this tensor back to the system."""
        first = -(-tensor.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (tensor.offset + tensor.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
        if length > 0 and self._bytes is not None:
            self._buffer.madvise(mmap.MADV_DONTNEED, first, length)

    def guard(self) -> FileWatch:
        """As GgufFile.guard. Raises GgufError when the file is not there any more."""
        if self._bytes is not None:
            self._guard = ReadGuard(self._bytes)
        try:
            return FileWatch(self.path, self._opened)
        except OSError as error:
            raise GgufError(f"{self.path} cannot be read: {error.strerror or error}") from None

    @property
    def broken(self) -> bool:
        """Whether something was read since `guard` that is not there any more."""
        return self._guard is not None and self._guard.broken

    def close(self) -> None:
        """Forgets the mapping; the system unmaps it when the last view of it is gone."""
        self._bytes = self._guard = None
        try:
            self._buffer.close()
        except BufferError:
            return  # views are still alive and keep the mapping


def _map(path: Path) -> tuple[mmap.mmap, os.stat_result]:
    try:
        with path.open("rb") as file:
            head = file.read(512)
            _check_magic(head, path)
            opened = os.fstat(file.fileno())
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), opened
    except OSError as error:
        raise GgufError(f"{path} cannot be read: {error.strerror or error}") from None


def _check_magic(head: bytes, path: Path) -> None:
    if not head:
        raise GgufError(f"{path} is empty: download it again")
    if head.startswith(b"version https://git-lfs"):
        raise GgufError(
            f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in its folder"
            " or download the file directly"
        )
    if head.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        raise GgufError(f"{path} is a web page, not a GGUF file: take the download link of the file itself")
    if head[:4] in (b"lmgg", b"fmgg", b"tjgg"):
        raise GgufError(f"{path} is in a format older than GGUF: download a GGUF of this model")
    if head[:4] == b"FUGG":
        raise _big_endian(path)
    if not b"GGUF".startswith(head[:4]):
        raise GgufError(
            f"{path} is not a GGUF file (it begins with {head[:4]!r}, not b'GGUF'):"
            " give the path of a .gguf file"
        )


def _big_endian(path: Path) -> GgufError:
    return GgufError(f"{path} is a big-endian GGUF: take the ordinary little-endian file of this model")


def _counts(cursor: Cursor, path: Path) -> tuple[int, int]:
    """Checks magic and version; returns the numbers of key-value pairs and of tensors."""
    cursor.u32("the magic number")
    version = cursor.u32("the version")
    if version and not version & 0xFFFF:
        raise _big_endian(path)
    if version not in (2, 3):
        raise GgufError(
            f"{path} is GGUF version {version}, and ktd reads versions 2 and 3:"
            " take a file made by a current llama.cpp"
        )
    tensors = cursor.u64("the number of tensors")
    pairs = cursor.u64("the number of metadata keys")
    if tensors * _MIN_TENSOR_BYTES + pairs * _MIN_PAIR_BYTES > cursor.remaining:
        raise cursor.damaged(f"its header claims {tensors} tensors and {pairs} metadata keys")
    return pairs, tensors


def _metadata(cursor: Cursor, count: int) -> dict[str, object]:
    metadata: dict[str, object] = {}
    for number in range(1, count + 1):
        key = cursor.string(f"the name of metadata key {number} of {count}")
        if not key:
            raise cursor.damaged(f"metadata key {number} has no name")
        if key in metadata:
            raise cursor.damaged(f"metadata key {quoted(key)} occurs twice")
        metadata[key] = cursor.value(f"metadata key {quoted(key)}")
    return metadata


def _alignment(metadata: Mapping[str, object], path: Path) -> int:
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    valid = isinstance(alignment, int) and 0 < alignment <= _MAX_ALIGNMENT and alignment.bit_count() == 1
    if not isinstance(alignment, int) or not valid:
        raise GgufError(
            f"{path}: general.alignment is {alignment!r}, which is no power of two up to {_MAX_ALIGNMENT};"
            " the file is damaged, download it again"
        )
    return alignment


def _tensors(
    cursor: Cursor, count: int, shard: int, alignment: int, file_size: int, path: Path
) -> dict[str, TensorInfo]:
    """The tensor table, every entry inside the file and none overlapping another."""
    entries = [_entry(cursor, number, count) for number in range(1, count + 1)]
    start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    for name, shape, ggml_type, offset in entries:
        if name in tensors:
            raise cursor.damaged(f"tensor {quoted(name)} occurs twice")
        if offset % alignment:
            raise cursor.damaged(f"tensor {quoted(name)} is not aligned to {alignment} bytes")
        nbytes = prod(shape) // ggml_type.block_values * ggml_type.block_bytes
        tensors[name] = TensorInfo(name, shape, ggml_type, nbytes, shard, start + offset)
    end, last = start, ""
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        if tensor.offset < end:
            raise cursor.damaged(f"tensors {quoted(last)} and {quoted(tensor.name)} overlap")
        end, last = tensor.offset + tensor.nbytes, tensor.name
        if end > file_size:
            raise GgufError(
                f"{path} is truncated: tensor {quoted(last)} ends at byte {end} but the file has {file_size}"
                " bytes; download this file again"
            )
    return tensors


def _entry(cursor: Cursor, number: int, count: int) -> tuple[str, tuple[int, ...], GgmlType, int]:
    name = cursor.string(f"the name of tensor {number} of {count}")
    what = f"tensor {quoted(name)}"
    if not name:
        raise cursor.damaged(f"tensor {number} has no name")
    dimensions = cursor.u32(what)
    if not 1 <= dimensions <= _MAX_DIMENSIONS:
        raise cursor.damaged(f"{what} claims {dimensions} dimensions")
    shape = tuple(reversed([cursor.u64(what) for _ in range(dimensions)]))
    if prod(shape) == 0:
        raise cursor.damaged(f"{what} has an empty dimension")
    kind = cursor.u32(what)
    offset = cursor.u64(what)
    try:
        ggml_type = GgmlType(kind)
    except ValueError:
        raise GgufError(f"{cursor.path}: {what} is {refusal(kind)}") from None
    if shape[-1] % ggml_type.block_values:
        raise cursor.damaged(
            f"{what} has rows of {shape[-1]} values, not a multiple of the {ggml_type.block_values} of a"
            f" {ggml_type.name} block"
        )
    return name, shape, ggml_type, offset
