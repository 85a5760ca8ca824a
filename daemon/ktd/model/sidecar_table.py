"""The table of a file of packed weights: what it was made of, and where each weight is.

A page that says where the table is; the weights, each from a multiple of UNIT on; the table, in JSON.
"""

from __future__ import annotations

import hashlib
import math
import os
import stat
import struct
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from ktd.gguf import GgmlType, GgufFile
from ktd_kernels import Cpu, Weight

UNIT = 2 << 20  # a huge page
CHUNK = 16 << 20  # bytes with a CRC-32 of their own
_NAME = b"ktd packed weights "
_MAGIC = _NAME + b"1"
_HEAD = struct.Struct("<24sQQI")  # magic, where the table is, its bytes, its CRC-32
_MOST_TABLE = 1 << 28
_SAMPLES, _SAMPLE = 64, 4096  # of each file of a model


class UnfitError(Exception):
    """Why a file is of no use, in words that follow its name. It may be made again."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Entry(_Strict):
    ggml_type: int
    shape: tuple[int, ...]
    offset: NonNegativeInt
    nbytes: NonNegativeInt
    checks: tuple[int, ...]  # CRC-32 of each chunk


class Table(_Strict):
    """`weights` by key, `covers` the tensors of the file that they were made of, `layouts` by type."""

    model: str
    layouts: dict[str, str]
    covers: frozenset[str]
    weights: dict[str, Entry]

    @classmethod
    def read(cls, fd: int, path: Path, owners: Collection[int]) -> tuple[Table, int]:
        """The table of a file that belongs to one of `owners`, and the file's bytes. Raises UnfitError,
        OSError."""
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is not a file")
        head = os.pread(fd, _HEAD.size, 0)
        if head[: len(_NAME)] != _NAME[: len(head)]:
            raise OSError(f"{path} is not a file of repacked weights; it is left as it is")
        if status.st_uid not in owners:
            raise OSError(f"{path} is of a user who could not change the model itself; it is left as it is")
        if len(head) < _HEAD.size:
            raise UnfitError("is damaged")
        magic, start, size, crc = _HEAD.unpack(head)
        if magic != _MAGIC.ljust(24, b"\0"):
            raise UnfitError("was made by another version of ktd")
        if size > _MOST_TABLE or start + size != status.st_size:
            raise UnfitError("is damaged")
        text = os.pread(fd, size, start)
        if zlib.crc32(text) != crc:
            raise UnfitError("is damaged")
        try:
            table = cls.model_validate_json(text)
        except ValidationError:
            raise UnfitError("is damaged") from None
        for entry in table.weights.values():
            inside = entry.offset % UNIT == 0 and entry.offset + entry.nbytes <= start
            if not inside or len(entry.checks) != -(-entry.nbytes // CHUNK):
                raise UnfitError("is damaged")
        return table, status.st_size

    def write(self, fd: int, end: int) -> None:
        """Behind weights that end at `end`, and the page that says so. Raises OSError."""
        text = self.model_dump_json().encode()
        write_all(fd, memoryview(text), end)
        write_all(fd, memoryview(_HEAD.pack(_MAGIC, end, len(text), zlib.crc32(text))), 0)


@dataclass(frozen=True, slots=True)
class Origin:
    """What a file is made of and for: a digest of the model, and one of each type's layout."""

    model: str
    layouts: dict[str, str]

    @classmethod
    def of(cls, gguf: GgufFile, cpu: Cpu) -> Origin:
        kinds = {tensor.ggml_type for tensor in gguf.tensors.values()}
        layouts = {kind.name: layout for kind in kinds if (layout := _layout(cpu, kind))}
        return cls(_model_digest(gguf), layouts)


def _model_digest(gguf: GgufFile) -> str:
    """Of sizes and times of a model's files, of all that stands before their tensors, and of samples."""
    digest = hashlib.sha256()
    for number, path in enumerate(gguf.paths):
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            size = status.st_size
            first = min((t.offset for t in gguf.tensors.values() if t.shard == number), default=size)
            digest.update(struct.pack("<qqq", size, status.st_mtime_ns, first))
            digest.update(file.read(first))
            for place in range(first, size, max((size - first) // _SAMPLES, _SAMPLE)):
                digest.update(os.pread(file.fileno(), _SAMPLE, place))
    return digest.hexdigest()


def _layout(cpu: Cpu, kind: GgmlType) -> str:
    """A digest of what packing makes of fixed blocks, so that no other layout has the same; empty where
    nothing is packed."""
    shape = (32, 1024)
    if kind.block_values > 256 or not _packs(cpu, kind, shape):
        return ""
    size = math.prod(shape) // kind.block_values * kind.block_bytes
    blocks = np.frombuffer(hashlib.shake_256(b"blocks").digest(size), np.uint8)
    weight = cpu.pack(Weight(blocks, int(kind), shape))
    return f"{weight.layout} {hashlib.sha256(weight.bytes.data).hexdigest()}"


def _packs(cpu: Cpu, kind: GgmlType, shape: Sequence[int]) -> bool:
    try:
        return cpu.packed_bytes(int(kind), shape) > 0
    except ValueError:  # no kernels for this type
        return False


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """At `offset` of a file. Raises OSError."""
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
