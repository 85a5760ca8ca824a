"""Medians over rounds, and what a machine could reach at best."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ktd_kernels import memory_bandwidth
from ktd_kernels.numa import interleaved

_LEAST_TURNS, _MOST_TURNS = 3, 25


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
