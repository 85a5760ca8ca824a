"""Host memory to a GPU: straight from where it is if its pages could be locked there, at the speed of the
bus; else through page-locked pieces that several threads fill, at about half of that."""

from __future__ import annotations

import bisect
import ctypes
import mmap
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait

import numpy as np
import numpy.typing as npt
import torch

from ktd_kernels import Weight
from ktd_kernels.cuda import GpuWeight, weight_of

# Large enough for the bus, small enough that the first copy starts soon.
_PIECE = 16 << 20
_PIECES = 8
# One thread copies a quarter of what the bus takes; parts are whole pages.
_THREADS = 8
_PART = 1 << 20
_ALIGNMENT = 256
# Groups whose work may be launched before the first of them is done: more, and a step that is given up takes
# long to end; fewer, and the device waits for this thread.
_AHEAD = 12
_READ_ONLY = 8  # CU_MEMHOSTREGISTER_READ_ONLY: what the pages of a mapped file need


class Uploader:
    """Page-locked memory of one device. Used by one thread at a time."""

    def __init__(self) -> None:
        self._pieces = [torch.zeros(_PIECE, dtype=torch.uint8, pin_memory=True) for _ in range(_PIECES)]
        self._copied = [event() for _ in range(_PIECES)]
        self._next = 0
        self._driver = ctypes.CDLL("libcuda.so.1")
        self._locked: list[tuple[int, int]] = []  # first byte, end; ascending
        self._kept: list[npt.NDArray[np.uint8]] = []
        weakref.finalize(self, _unlock, self._driver, self._locked)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="ktd-upload")

    def lock(self, data: npt.NDArray[np.uint8], read_only: bool) -> bool:
        """Keeps whole pages of `data` in memory from now on, for `send` to copy from; False where the system
        does not allow it. `read_only`: the pages may be those of a mapped file. Else the last one, of which
        `data` has a part, is kept too."""
        if self.locked(data):
            return True
        address = data.ctypes.data
        first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        end = address + data.size + (0 if read_only else mmap.PAGESIZE - 1)
        end = end // mmap.PAGESIZE * mmap.PAGESIZE
        size, flags = ctypes.c_size_t(end - first), _READ_ONLY if read_only else 0
        if end <= first or self._driver.cuMemHostRegister_v2(ctypes.c_void_p(first), size, flags):
            return False
        bisect.insort(self._locked, (first, end))
        self._kept.append(data)
        return True

    def locked(self, data: npt.NDArray[np.uint8]) -> bool:
        """Whether all of `data` was locked, so that kernels may read it where it is."""
        return self._locked_part(data.ctypes.data, data.ctypes.data + data.size) == (
            data.ctypes.data,
            data.ctypes.data + data.size,
        )

    def send(self, source: npt.NDArray[np.uint8], target: torch.Tensor) -> None:
        """Copies bytes on the current stream. What is not locked was read when this returns; the rest must
        stay as it is until the stream has passed."""
        address = source.ctypes.data
        first, end = self._locked_part(address, address + source.size)
        if first < end:
            self._send_pieces(source[: first - address], target[: first - address])
            result = self._driver.cuMemcpyHtoDAsync_v2(
                ctypes.c_uint64(target.data_ptr() + first - address),
                ctypes.c_void_p(first),
                ctypes.c_size_t(end - first),
                ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
            )
            if result:
                raise RuntimeError(f"the CUDA driver refused a copy to the GPU: error {result}")
            source, target = source[end - address :], target[end - address :]
        self._send_pieces(source, target)

    def _locked_part(self, start: int, end: int) -> tuple[int, int]:
        """What of [start, end) is locked, in one tensor; empty if nothing is."""
        place = bisect.bisect_right(self._locked, (start, end))
        for first, last in self._locked[max(place - 1, 0) : place + 1]:
            if max(first, start) < min(last, end):
                return max(first, start), min(last, end)
        return start, start

    def _send_pieces(self, source: npt.NDArray[np.uint8], target: torch.Tensor) -> None:
        for start in range(0, source.size, _PIECE):
            part = source[start : start + _PIECE]
            number = self._next
            self._next = (number + 1) % _PIECES
            self._copied[number].synchronize()
            piece = self._pieces[number]
            self._fill(piece.numpy(), part)
            target[start : start + part.size].copy_(piece[: part.size], non_blocking=True)
            self._copied[number].record()

    def _fill(self, piece: npt.NDArray[np.uint8], part: npt.NDArray[np.uint8]) -> None:
        def copy(start: int) -> None:
            np.copyto(piece[start : min(start + _PART, part.size)], part[start : start + _PART])

        wait([self._threads.submit(copy, start) for start in range(0, part.size, _PART)])


def _unlock(driver: ctypes.CDLL, locked: list[tuple[int, int]]) -> None:
    for first, _ in locked:
        driver.cuMemHostUnregister(ctypes.c_void_p(first))


class WeightStream:
    """Weights that pass through the device, in so many `rooms` for groups of up to `nbytes`."""

    def __init__(self, uploader: Uploader, device: torch.device, nbytes: int, rooms: int) -> None:
        self._uploader = uploader
        self._rooms = [torch.empty(nbytes, dtype=torch.uint8, device=device) for _ in range(rooms)]
        self._arrived = [event() for _ in self._rooms]
        self._free = [event() for _ in self._rooms]
        self._done = [event() for _ in range(_AHEAD)]
        self._stream = stream()
        self._coming: Iterator[Sequence[Weight]] = iter(())
        self._sent: deque[tuple[int, Sequence[Weight], list[torch.Tensor]]] = deque()
        self._sendings = self._works = 0

    def begin(self, groups: Iterable[Sequence[Weight]]) -> None:
        """The first of `groups` are sent, the others as rooms become free. What was begun before and has not
        passed is forgotten."""
        self._coming = iter(groups)
        self._sent.clear()
        for _ in self._rooms:
            self._send_next()

    def pass_through(self, count: int) -> Iterator[list[GpuWeight]]:
        """The next `count` groups, each on the device for work on the current stream until the next is asked
        for. Those behind them are sent while that work, and what the stream is given in between, is done."""
        work = torch.cuda.current_stream()
        for _ in range(count):
            room, group, places = self._sent.popleft()
            done = self._done[self._works % _AHEAD]
            self._works += 1
            done.synchronize()
            work.wait_event(self._arrived[room])
            yield [
                weight_of(place, weight.layout, weight.ggml_type, weight.shape)
                for place, weight in zip(places, group, strict=True)
            ]
            self._free[room].record(work)
            done.record(work)
            self._send_next()

    def _send_next(self) -> None:
        group = next(self._coming, None)
        if group is None:
            return
        room = self._sendings % len(self._rooms)
        self._sendings += 1
        places: list[torch.Tensor] = []
        start = 0
        # The stream waits, not this thread: while the CPU computes experts a thread is woken late.
        self._stream.wait_event(self._free[room])
        with torch.cuda.stream(self._stream):
            for weight in group:
                places.append(self._rooms[room][start : start + weight.nbytes])
                self._uploader.send(weight.bytes, places[-1])
                start += -(-weight.nbytes // _ALIGNMENT) * _ALIGNMENT
            self._arrived[room].record()
        self._sent.append((room, group, places))


def stream() -> torch.cuda.Stream:
    """A stream of the current device."""
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def event() -> torch.cuda.Event:
    """An event that has happened. Who waits for it sleeps: the CPU may be computing experts meanwhile."""
    return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
