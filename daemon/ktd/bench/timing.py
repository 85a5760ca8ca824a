"""Medians over rounds, and what a machine could reach at best."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ktd_kernels import Cpu, memory_bandwidth
from ktd_kernels.numa import interleaved

_LEAST_TURNS, _MOST_TURNS = 3, 25
# A turn of the peak, about: many times the start of a loop, little beside what it is held against.
_PEAK_SECONDS = 0.01


def interleaved_medians(
    runs: Sequence[Callable[[int], None]], sizes: Sequence[int], budget: float
) -> list[float]:
    """Median seconds per piece of work of each of `runs`, called in turns so that a busy moment hits all.

    run(i) does sizes[i] pieces. One warm-up each, then rounds i = 0, 1, … until `budget` seconds are spent,
    between 3 and 25 of them.
    """
    for run in runs:
        run(0)
    samples: list[list[float]] = [[] for _ in runs]
    deadline = time.perf_counter() + budget
    for turn in range(_MOST_TURNS):
        if turn >= _LEAST_TURNS and time.perf_counter() > deadline:
            break
        number = turn % len(sizes)
        for run, taken in zip(runs, samples, strict=True):
            start = time.perf_counter()
            run(number)
            taken.append((time.perf_counter() - start) / sizes[number])
    return [statistics.median(taken) for taken in samples]


class Peak:
    """Multiplies on registers alone for about ten milliseconds a run, in turns with the product it limits.

    `floats`: multiply-adds of float32, else those of int8 that the instruction set's products are made of.
    """

    def __init__(self, cpu: Cpu, *, floats: bool) -> None:
        self._cpu, self._floats, self._loops = cpu, floats, 64
        self._rates: list[float] = []
        while self._multiply()[1] < _PEAK_SECONDS / 2:
            self._loops *= 2

    def _multiply(self) -> tuple[int, float]:
        start = time.perf_counter()
        operations = self._cpu.multiply_registers(self._loops, self._floats)
        return operations, time.perf_counter() - start

    def run(self, _: int) -> None:
        """One measurement; a turn of `interleaved_medians`."""
        operations, seconds = self._multiply()
        self._rates.append(operations / seconds)

    @property
    def rate(self) -> float:
        """Operations a second, two a multiply-add: the median of the runs."""
        return statistics.median(self._rates)


@functools.cache
def read_bandwidth(threads: int) -> float:
    """Bytes a second that `threads` threads read from memory that lies as weights do: the best of three short
    probes."""
    with interleaved():
        probes: list[float] = [memory_bandwidth(threads, 0.33) for _ in range(3)]
    return max(probes)


def last_level_cache_bytes() -> int:
    """Third-level caches of the whole machine; 64 MiB where Linux does not say."""
    caches: dict[str, int] = {}
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index3"):
        try:
            shared = (index / "shared_cpu_list").read_text().strip()
            size = (index / "size").read_text().strip()
        except OSError:
            continue
        if size.endswith("K"):
            caches[shared] = int(size[:-1]) << 10
    return sum(caches.values()) or 64 << 20
