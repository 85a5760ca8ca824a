"""Routed experts whose weights are sent to the GPU for the step: for many rows of long prompts, where a layer
is sent faster than the CPU computes it."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from ktd.model.device import Blocks, Device
from ktd.model.exchange import Exchange
from ktd.model.ffn import Experts
from ktd.model.placement import GROUP_BYTES
from ktd.model.workspace import Views
from ktd_kernels import Cpu

_ALIGNMENT = 256
# Numbers of rows among which the crossover is sought.
_LEAST_ROWS = 64


class StreamedExperts:
    """As Elsewhere says: while a group of experts is computed the next is on its way."""

    def __init__(self, device: Device, layers: list[Experts]) -> None:
        self._device = device
        largest = max(sum(data.size + _ALIGNMENT for data, _, _ in layer.blocks) for layer in layers)
        self._room = min(GROUP_BYTES, largest)
        device.reserve_stream(self._room)

    def start(self, experts: Experts, v: Views) -> None:
        """Nothing: there is more to send than the rest of the layer takes."""

    def finish(self, experts: Experts, v: Views) -> None:
        """As Elsewhere says."""
        firsts, groups = self._cut(experts.blocks)
        for first, (gate, up, down) in zip(firsts, self._device.pass_through(groups), strict=True):
            ids = v.expert_ids - first  # those outside the group add nothing
            self._device.prompt.moe(gate, up, down, v.h, ids, v.expert_weights, v.x, accumulate=True)

    def seconds(self, experts: Experts) -> float:
        """Time to send a layer, estimated from its first group."""
        _, groups = self._cut(experts.blocks)
        group = next(groups)
        for _ in range(2):
            start = time.perf_counter()
            for _ in self._device.pass_through([group]):
                pass
            self._device.synchronize()
            taken = time.perf_counter() - start
        return taken * sum(b[0].size for b in experts.blocks) / sum(b[0].size for b in group)

    def _cut(self, blocks: list[Blocks]) -> tuple[range, Iterator[list[Blocks]]]:
        """First experts of the groups, and the groups."""
        total = blocks[0][2][0]
        each = sum(data.size // total for data, _, _ in blocks)
        count = max((self._room - len(blocks) * _ALIGNMENT) // each, 1)
        firsts = range(0, total, count)
        return firsts, ([_part(b, first, count) for b in blocks] for first in firsts)


def crossover(cpu: Cpu, exchange: Exchange, streamed: StreamedExperts, experts: Experts, rows: int) -> int:
    """The least number of rows, a power of two up to `rows`, for which `streamed` is faster than the CPU; 0
    if there is none. Measured on one layer."""
    limit = streamed.seconds(experts)
    n = _LEAST_ROWS
    while n <= rows:
        if _cpu_seconds(cpu, exchange, experts, n) > limit:
            return n
        n *= 2
    return 0


def _cpu_seconds(cpu: Cpu, exchange: Exchange, experts: Experts, n: int) -> float:
    rng = np.random.default_rng(0)
    h, ids, weights, sums = (tensor.numpy() for tensor in exchange.host(n))
    h[:] = rng.standard_normal(h.shape, np.float32)
    count = experts.gate.shape[0]
    ids[:] = [rng.permutation(count)[: ids.shape[1]] for _ in range(n)]
    weights[:] = 1.0
    for _ in range(2):
        start = time.perf_counter()
        cpu.moe(experts.gate, experts.up, experts.down, h, ids, weights, sums)
        taken = time.perf_counter() - start
    return taken


def _part(blocks: Blocks, first: int, count: int) -> Blocks:
    data, kind, (total, *matrix) = blocks
    size = data.size // total
    count = min(count, total - first)
    return data[first * size : (first + count) * size], kind, (count, *matrix)
