"""Routed experts whose weights are sent to the GPU for the step: for many rows of long prompts, where a layer
is sent faster than the CPU computes it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np

from ktd.model.device import Device
from ktd.model.exchange import Exchange
from ktd.model.ffn import Elsewhere, Experts
from ktd.model.placement import GROUP_BYTES
from ktd.model.workspace import Views
from ktd_kernels import Cpu, Weight

_ALIGNMENT = 256
# Numbers of rows among which the crossover is sought.
_LEAST_ROWS = 64


class StreamedExperts:
    """As Elsewhere says: while a group of experts is computed the next is on its way. Other layers than
    `layers` are left to `others`.

    Sent is what the CPU computes with, so that no second copy of a layer need stay in memory; what the device
    cannot read in the CPU's layout is sent from the file.
    """

    def __init__(self, device: Device, layers: Sequence[Experts], others: Elsewhere) -> None:
        self._device = device
        self._others = others
        self._stacks = {experts.layer: _sent(device, experts) for experts in layers}
        self._own = [w for e in layers for w in (e.gate, e.up, e.down) if w in self._stacks[e.layer]]

    @property
    def file_bytes(self) -> int:
        """Bytes that are read from the file, or from what the system keeps of it."""
        return sum(w.nbytes for stacks in self._stacks.values() for w in stacks if w.layout == "file")

    def prepare(self) -> None:
        """Makes room on the device, and keeps what the CPU computes with in its place. (The file's pages
        beside a packed copy may leave memory when it is short.)"""
        largest = max(sum(w.nbytes + _ALIGNMENT for w in stacks) for stacks in self._stacks.values())
        self._room = min(GROUP_BYTES, largest)
        self._device.reserve_stream(self._room)
        for weight in self._own:
            self._device.lock(weight)  # what cannot be is sent too, slower

    def start(self, experts: Experts, v: Views) -> None:
        """As Elsewhere says; of layers that are sent there is more to send than the rest of them takes."""
        if experts.layer not in self._stacks:
            self._others.start(experts, v)

    def finish(self, experts: Experts, v: Views) -> None:
        """As Elsewhere says."""
        if experts.layer not in self._stacks:
            self._others.finish(experts, v)
            return
        firsts, groups = self._cut(self._stacks[experts.layer])
        for first, (gate, up, down) in zip(firsts, self._device.pass_through(groups), strict=True):
            ids = v.expert_ids - first  # those outside the group add nothing
            self._device.prompt.moe(gate, up, down, v.h, ids, v.expert_weights, v.x, accumulate=True)

    def seconds(self, experts: Experts) -> float:
        """Time to send a layer, estimated from its first group."""
        stacks = self._stacks[experts.layer]
        _, groups = self._cut(stacks)
        group = next(groups)
        for _ in range(2):
            start = time.perf_counter()
            for _ in self._device.pass_through([group]):
                pass
            self._device.synchronize()
            taken = time.perf_counter() - start
        return taken * sum(w.nbytes for w in stacks) / sum(w.nbytes for w in group)

    def _cut(self, stacks: list[Weight]) -> tuple[range, Iterator[list[Weight]]]:
        """First experts of the groups, and the groups."""
        total = stacks[0].shape[0]
        each = sum(w.nbytes // total for w in stacks)
        count = max((self._room - len(stacks) * _ALIGNMENT) // each, 1)
        firsts = range(0, total, count)
        return firsts, ([w.part(first, min(count, total - first)) for w in stacks] for first in firsts)


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


def _sent(device: Device, experts: Experts) -> list[Weight]:
    """The stacks to send: those of the CPU, or the file's where the device cannot read them."""
    own: tuple[Weight, ...] = (experts.gate, experts.up, experts.down)
    return [
        w if device.reads(w.layout, w.ggml_type) else blocks
        for w, blocks in zip(own, experts.blocks, strict=True)
    ]
