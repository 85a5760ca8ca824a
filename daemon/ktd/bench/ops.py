"""What a decode step does beside its products: waking the threads, and attention at R1's shape."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ktd.bench.timing import interleaved_medians, read_bandwidth
from ktd_kernels import Cpu

# R1: heads, latent and rope values of a cached token; tokens of a page.
_HEADS, _LATENT, _ROPE, _PAGE = 128, 512, 64, 64
# Longer than the workers spin, so that they sleep.
_IDLE_SECONDS = 0.001


@dataclass(frozen=True, slots=True)
class HandOffResult:
    """Seconds until all threads of a pool work: straight after another loop, and after an idle time."""

    threads: int
    busy_seconds: float
    idle_seconds: float


@dataclass(frozen=True, slots=True)
class AttentionResult:
    """Median seconds of latent attention of one layer for `rows` sequences of `context` tokens each."""

    rows: int
    context: int
    threads: int
    isa: str
    seconds: float
    bandwidth: float

    @property
    def gigaops_per_second(self) -> float:
        """Two operations for each of 576 products of a score and 512 of a value, per head and token."""
        return 2 * self.rows * _HEADS * self.context * (2 * _LATENT + _ROPE) / self.seconds / 1e9

    @property
    def wall_percent(self) -> float:
        """Share of the read bandwidth of memory, each cached token read once for all heads."""
        read = self.rows * self.context * (_LATENT + _ROPE) * 2
        return 100 * read / self.seconds / self.bandwidth


def hand_off(threads: int) -> HandOffResult:
    """Measure a pool of `threads`."""
    cpu = Cpu(threads=threads)
    return HandOffResult(threads, cpu.hand_off(2000), cpu.hand_off(100, _IDLE_SECONDS))


def _median(attend: Callable[[], None], seconds: float) -> float:
    return interleaved_medians([lambda _: attend()], [1], seconds)[0]


def attention(
    rows: Sequence[int], contexts: Sequence[int], cpu: Cpu, seconds: float
) -> Iterator[AttentionResult]:
    """Measure every pair of a number of sequences and a context, each sequence with pages of its own."""
    rng = np.random.default_rng(0)
    for context in contexts:
        pages = -(-context // _PAGE)
        for count in rows:
            values = rng.standard_normal((count * pages, _PAGE, _LATENT + _ROPE), np.float32)
            cache = (values.view(np.uint32) >> 16).astype(np.uint16)
            order = rng.permutation(count * pages).astype(np.int32).reshape(count, pages)
            queries = rng.standard_normal((count, _HEADS, _LATENT + _ROPE), np.float32)
            out = np.empty((count, _HEADS, _LATENT), np.float32)
            attend = functools.partial(
                cpu.mla_attention,
                queries[:, :, :_LATENT],
                queries[:, :, _LATENT:],
                cache,
                order,
                np.arange(count, dtype=np.int32),
                np.full(count, context, np.int32),
                (_LATENT + _ROPE) ** -0.5,
                out,
            )
            median = _median(attend, seconds)
            yield AttentionResult(count, context, cpu.threads, cpu.isa, median, read_bandwidth(cpu.threads))
