"""Quantised products at the sizes of R1's experts, with many experts touched at random."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from ktd.bench.ggml import Ggml, Products
from ktd.bench.timing import Peak, interleaved_medians, last_level_cache_bytes, read_bandwidth
from ktd.errors import EngineFailure
from ktd.synth.blocks import random_bytes
from ktd_kernels import Cpu, Weight, arrays

# ffn_up/gate_exps and ffn_down_exps of R1, [rows, cols].
EXPERT_SHAPES = ((2048, 7168), (7168, 2048))
# Matrices of one timed round x tokens: enough to hide the cost of a call. With one token a round walks the
# whole stack; with many, rounds walk it in turns.
_ROUND_COLUMNS = 64
_MOST_ROUNDS = 8
# A stack is this many times the last-level caches, so that every matrix comes from memory.
_CACHE_MULTIPLE = 4
_LEAST_MATRICES = 4


@dataclass(frozen=True, slots=True)
class KernelResult:
    """One measurement: median seconds of one product [rows, cols] x tokens, bandwidth in bytes a second.

    `layout` is how the weights lay in memory, "file" for GGUF blocks; `nbytes` are the file's in any case.
    `peak` is what as many threads multiply on registers, in operations a second, measured in turns with the
    product; None for instruction set "scalar".
    """

    type: str
    rows: int
    cols: int
    tokens: int
    threads: int
    isa: str
    layout: str
    nbytes: int
    seconds: float
    bandwidth: float
    peak: float | None
    peer_seconds: float | None

    @property
    def ns_per_block(self) -> float:
        """Nanoseconds for 256 weights and one token."""
        return self.seconds * 1e9 / (self.rows * self.cols / 256 * self.tokens)

    @property
    def gigabytes_per_second(self) -> float:
        """File bytes of the matrix over time."""
        return self.nbytes / self.seconds / 1e9

    @property
    def gigaops_per_second(self) -> float:
        """Two operations a weight and token."""
        return 2 * self.rows * self.cols * self.tokens / self.seconds / 1e9

    @property
    def memory_percent(self) -> float:
        """Share of the read bandwidth of memory, measured with as many threads."""
        return 100 * self.nbytes / self.seconds / self.bandwidth

    @property
    def compute_percent(self) -> float | None:
        """Share of what multiplying on registers reaches."""
        return None if self.peak is None else 100 * self.gigaops_per_second * 1e9 / self.peak

    @property
    def wall(self) -> str:
        """Which of the two takes longer: "memory" or "compute"."""
        return "compute" if (self.compute_percent or 0) > self.memory_percent else "memory"

    @property
    def wall_percent(self) -> float:
        """Share of what the slower of the two allows."""
        return max(self.memory_percent, self.compute_percent or 0)

    @property
    def speedup(self) -> float | None:
        """Peer's time over ours: above 1 we are faster."""
        return None if self.peer_seconds is None else self.peer_seconds / self.seconds

    def as_json(self) -> dict[str, object]:
        """All fields and derived figures."""
        rates = ("ns_per_block", "gigabytes_per_second", "gigaops_per_second")
        walls = ("memory_percent", "compute_percent", "wall", "wall_percent")
        return asdict(self) | {name: getattr(self, name) for name in (*rates, *walls, "speedup")}


@dataclass(frozen=True, slots=True)
class KernelBench:
    """What to measure. `seconds` is spent on each measurement; with `peer` both sides get it together."""

    types: Sequence[GGMLQuantizationType]
    tokens: Sequence[int]
    threads: Sequence[int]
    isas: Sequence[str]
    seconds: float
    peer: Ggml | None

    def __len__(self) -> int:
        """Number of measurements."""
        return len(EXPERT_SHAPES) * math.prod(map(len, (self.types, self.tokens, self.threads, self.isas)))

    def run(self) -> Iterator[KernelResult]:
        """Measure one after the other; raises EngineFailure if ours and the peer's results differ."""
        cpus = [Cpu(threads=threads, isa=isa) for isa in self.isas for threads in self.threads]
        for kind in self.types:
            for rows, cols in EXPERT_SHAPES:
                stack = _make_stack(kind, rows, cols)
                for tokens in self.tokens:
                    for cpu in cpus:
                        yield self._measure(stack, kind, (rows, cols), tokens, cpu)

    def _measure(
        self,
        stack: NDArray[np.uint8],
        kind: GGMLQuantizationType,
        shape: tuple[int, int],
        tokens: int,
        cpu: Cpu,
    ) -> KernelResult:
        rows, cols = shape
        rng = np.random.default_rng(tokens)
        x = rng.standard_normal((tokens, cols), np.float32)
        out = np.empty((tokens, rows), np.float32)
        order = rng.permutation(len(stack)).tolist()
        step = max(1, _ROUND_COLUMNS // tokens)
        rounds = [order[start : start + step] for start in range(0, len(order), step)][:_MOST_ROUNDS]
        weights = [Weight(matrix, int(kind), shape) for matrix in stack]
        if cpu.packed_bytes(int(kind), shape):  # as the loader does
            weights = [cpu.pack(weight) for weight in weights]

        def multiply(number: int) -> None:
            for pick in rounds[number]:
                cpu.linear(weights[pick], x, out)

        products = None
        if self.peer is not None:
            products = Products(self.peer, stack, int(kind), shape, x, rounds, cpu.threads)
        runs: list[Callable[[int], None]] = [multiply] if products is None else [multiply, products.run]
        peak = None if cpu.isa == "scalar" else Peak(cpu, floats=GGML_QUANT_SIZES[kind][0] == 1)
        if peak is not None:
            runs.append(peak.run)
        medians = interleaved_medians(runs, list(map(len, rounds)), self.seconds)
        if products is not None:
            multiply(0)
            _check_agreement(out, products.last(0), kind.name)
            products.close()
        return KernelResult(
            type=kind.name,
            rows=rows,
            cols=cols,
            tokens=tokens,
            threads=cpu.threads,
            isa=cpu.isa,
            layout=weights[0].layout,
            nbytes=stack.shape[1],
            seconds=medians[0],
            bandwidth=read_bandwidth(cpu.threads),
            peak=None if peak is None else peak.rate,
            peer_seconds=medians[1] if products is not None else None,
        )


def _make_stack(kind: GGMLQuantizationType, rows: int, cols: int) -> NDArray[np.uint8]:
    """Random matrices [count, bytes], 64-byte aligned, together several times the caches."""
    values, size = GGML_QUANT_SIZES[kind]
    nbytes = rows * cols // values * size
    count = max(_LEAST_MATRICES, -(-_CACHE_MULTIPLE * last_level_cache_bytes() // nbytes))
    stack = arrays.empty((count, nbytes), np.uint8)
    rng = np.random.default_rng(int(kind))
    for matrix in stack:
        matrix[:] = random_bytes(kind, rows * cols, cols**-0.5, rng)
    return stack


def _check_agreement(ours: NDArray[np.float32], peers: NDArray[np.float32], name: str) -> None:
    """Both quantise activations on their own way, so a correlation is asked for, not equality."""
    correlation = float(np.corrcoef(ours.reshape(-1), peers.reshape(-1))[0, 1])
    if not correlation > 0.999:
        raise EngineFailure(
            f"Our product of {name} and llama.cpp's do not agree (correlation {correlation:.4f})."
        )
