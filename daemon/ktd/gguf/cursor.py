"""Reading the header of a GGUF file, value by value, never past its end.

Layout: the GGUF specification (ggml, docs/gguf.md), versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from array import array
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import overload

import numpy as np

from ktd.errors import GgufError

# What a damaged length or count may ask for at most. The largest known headers hold some 10 MB.
MAX_HEADER_BYTES = 1 << 27
MAX_ARRAY_LENGTH = 1 << 24
_MAX_ARRAY_DEPTH = 4

_BOOL, _STRING, _ARRAY = 7, 8, 9
_NUMBERS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    _BOOL: struct.Struct("<B"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


def quoted(name: str) -> str:
    """A name from a file as it may stand in a message: printable and short."""
    return repr(name if len(name) <= 80 else name[:77] + "...")


class StringArray(Sequence[str]):
    """An array of strings that stays bytes until somebody looks at it, and is then decoded once."""

    def __init__(self, raw: bytes, ends: Sequence[int], origin: str) -> None:
        """`raw` holds length-prefixed strings, `ends[i]` is where string i ends in it."""
        self._raw = raw
        self._ends = ends
        self._origin = origin

    @cached_property
    def _strings(self) -> list[str]:
        strings = []
        start = 8
        for index, end in enumerate(self._ends):
            try:
                strings.append(self._raw[start:end].decode())
            except UnicodeDecodeError:
                raise GgufError(
                    f"string {index} of {self._origin} is not UTF-8: the file is damaged, download it again"
                ) from None
            start = end + 8
        self._raw = b""
        return strings

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self._strings[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._strings)

    def __repr__(self) -> str:
        return f"<{len(self)} strings of {self._origin}>"


class Cursor:
    """A position in the header of one file. Every read names what it reads, for the message if it fails."""

    def __init__(self, buffer: mmap.mmap, path: Path) -> None:
        self._buffer = buffer
        self.path = path
        self._file_end = len(buffer)
        self._end = min(self._file_end, MAX_HEADER_BYTES)
        self.position = 0

    @property
    def remaining(self) -> int:
        """Bytes the header may still take."""
        return self._end - self.position

    def u32(self, what: str) -> int:
        return int(self._unpack(_U32, what))

    def u64(self, what: str) -> int:
        return int(self._unpack(_U64, what))

    def string(self, what: str) -> str:
        """A length-prefixed UTF-8 string."""
        length = self.u64(what)
        start = self._advance(length, what)
        try:
            return self._buffer[start : start + length].decode()
        except UnicodeDecodeError:
            raise self.damaged(f"{what} is not UTF-8") from None

    def value(self, what: str) -> object:
        """A typed metadata value: int, float, bool, str, list, or StringArray."""
        return self._value(self.u32(what), what, _MAX_ARRAY_DEPTH)

    def damaged(self, problem: str) -> GgufError:
        return GgufError(f"{self.path}: {problem}; the file is damaged, download it again")

    def _value(self, kind: int, what: str, depth: int) -> object:
        if kind == _STRING:
            return self.string(what)
        if kind == _ARRAY:
            return self._array(what, depth)
        if kind not in _NUMBERS:
            raise self.damaged(f"{what} has the unknown value type {kind}")
        number = self._unpack(_NUMBERS[kind], what)
        return self._flag(int(number), what) if kind == _BOOL else number

    def _array(self, what: str, depth: int) -> object:
        kind = self.u32(what)
        count = self.u64(what)
        if count > MAX_ARRAY_LENGTH:
            raise self.damaged(f"{what} claims {count} elements")
        if kind == _STRING:
            return self._strings(count, what)
        if kind == _ARRAY:
            if depth == 1:
                raise self.damaged(f"{what} nests arrays more than {_MAX_ARRAY_DEPTH} deep")
            if count * 12 > self.remaining:  # an array takes at least its type and its count
                raise self._truncated(what)
            return [self._array(what, depth - 1) for _ in range(count)]
        if kind not in _NUMBERS:
            raise self.damaged(f"{what} has elements of the unknown type {kind}")
        number = _NUMBERS[kind]
        start = self._advance(count * number.size, what)
        values = np.frombuffer(self._buffer, np.dtype(number.format), count, start).tolist()
        return [self._flag(value, what) for value in values] if kind == _BOOL else values

    def _strings(self, count: int, what: str) -> StringArray:
        # The one hot loop of the header: a vocabulary of 130,000 tokens passes here.
        start = position = self.position
        unpack, buffer, end = _U64.unpack_from, self._buffer, self._end
        ends = array("Q")
        for _ in range(count):
            if position + 8 > end:
                raise self._truncated(what)
            position += 8 + unpack(buffer, position)[0]
            if position > end:
                raise self._truncated(what)
            ends.append(position - start)
        self.position = position
        return StringArray(buffer[start:position], ends, f"{what} of {self.path}")

    def _flag(self, value: int, what: str) -> bool:
        if value > 1:
            raise self.damaged(f"{what} is a bool of value {value}")
        return value == 1

    def _unpack(self, number: struct.Struct, what: str) -> int | float:
        start = self._advance(number.size, what)
        value: int | float = number.unpack_from(self._buffer, start)[0]
        return value

    def _advance(self, count: int, what: str) -> int:
        """Steps over `count` bytes and returns where they start."""
        start = self.position
        if count > self._end - start:
            raise self._truncated(what)
        self.position = start + count
        return start

    def _truncated(self, what: str) -> GgufError:
        if self._end < self._file_end:
            return self.damaged(f"{what} reaches past the longest header ktd reads, {MAX_HEADER_BYTES} bytes")
        return GgufError(
            f"{self.path} ends inside its header, at {what}: the download was cut off or the file is damaged,"
            " download it again"
        )
