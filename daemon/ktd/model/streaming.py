"""Routed experts of prompts whose weights are sent to the GPU for the step. The bus and the CPU work at the
same time: of a layer's experts the first are sent, the rest is the CPU's."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ktd.model.device import Device
from ktd.model.exchange import Exchange
from ktd.model.ffn import Elsewhere, Experts
from ktd.model.placement import GROUP_BYTES, ROOMS
from ktd.model.workspace import Views
from ktd_kernels import Cpu, MoeJob, Weight

_ALIGNMENT = 256


class SentExperts:
    """The first experts of layers, computed on the device: while a group of them is computed the next are on
    their way, those of the next layer too.

    Sent is what the CPU computes with, so that no second copy of a layer need stay in memory; what the device
    cannot read in the CPU's layout is sent from the file.
    """

    def __init__(self, device: Device, layers: Sequence[Experts]) -> None:
        self._device = device
        self._stacks = {experts.layer: _sent(device, experts) for experts in layers}
        sizes = [sum(w.nbytes + _ALIGNMENT for w in stacks) for stacks in self._stacks.values()]
        self._room = min(GROUP_BYTES, max(sizes, default=0))
        self._coming: deque[tuple[int, int]] = deque()  # layer and share
        self._pairs: Any = None  # of the layer that was sorted and not yet added

    @property
    def file_bytes(self) -> int:
        """Bytes that are read from the file, or from what the system keeps of it."""
        return sum(w.nbytes for stacks in self._stacks.values() for w in stacks if w.layout == "file")

    def reserve(self) -> None:
        """Makes room on the device."""
        self._device.reserve_stream(self._room, ROOMS)

    def lock(self, experts: Experts) -> None:
        """Keeps what the CPU computes with in its place. (The file's pages beside a packed copy may leave
        memory when it is short.)"""
        for weight in (experts.gate, experts.up, experts.down):
            if weight in self._stacks[experts.layer]:
                self._device.lock(weight)  # what cannot be is sent too, slower

    def begin(self, shares: Mapping[int, int]) -> None:
        """Of these layers the first so many experts will be added, in the order of the layers."""
        self._coming = deque((layer, share) for layer in self._stacks if (share := shares.get(layer, 0)))
        self._device.begin_stream(
            [w.part(part.start, len(part)) for w in self._stacks[layer]]
            for layer, share in tuple(self._coming)
            for part in self._parts(layer, share)
        )

    def sort(self, experts: Experts, ids: torch.Tensor, v: Views) -> None:
        """Before `add`: the rows v.h have chosen `ids`, int32 [n, used], of the layer's first experts, where
        they are not negative."""
        self._pairs = self._device.prompt.pairs(v.h, ids, v.expert_weights, experts.gate.shape[0])

    def add(self, experts: Experts, v: Views) -> None:
        """Adds what the layer's first experts give to v.x."""
        layer, share = self._coming.popleft()
        if layer != experts.layer:
            raise RuntimeError(f"experts of layer {layer} were sent for layer {experts.layer}")
        parts = self._parts(layer, share)
        pairs, self._pairs = self._pairs, None  # the next layer's take their memory
        for part, (gate, up, down) in zip(parts, self._device.pass_through(len(parts)), strict=True):
            self._device.prompt.add_experts(gate, up, down, pairs, part.start, v.x)

    def _parts(self, layer: int, share: int) -> list[range]:
        """The experts of each group."""
        stacks = self._stacks[layer]
        each = sum(w.nbytes // w.shape[0] for w in stacks)
        count = max((self._room - len(stacks) * _ALIGNMENT) // each, 1)
        return [range(first, min(first + count, share)) for first in range(0, share, count)]


#: Consecutive rows of a step, and the number by which their shares are chosen.
Span = tuple[int, slice]


class SplitExperts:
    """As Elsewhere says: `shares[n][layer]` of a layer's experts are sent for the rows of a span of n, while
    the stream calls the CPU for the rest. All spans share one sending. Layers of which none are sent are left
    to `others`."""

    def __init__(
        self,
        sent: SentExperts,
        shares: Mapping[int, Mapping[int, int]],
        exchange: Exchange,
        cpu: Cpu,
        others: Elsewhere,
    ) -> None:
        self._sent, self._shares = sent, shares
        self._exchange, self._cpu, self._others = exchange, cpu, others
        self._spans: Sequence[Span] = ()
        self._jobs: list[tuple[int, MoeJob]] = []

    def begin(self, spans: Sequence[Span]) -> None:
        """The rows of the next step; the jobs of the last have ended. Sending begins."""
        self._spans = spans
        self._jobs.clear()
        most: dict[int, int] = {}
        for n, _ in spans:
            for layer, share in self._shares.get(n, {}).items():
                most[layer] = max(share, most.get(layer, 0))
        self._sent.begin(most)

    def start(self, experts: Experts, v: Views) -> None:
        """As Elsewhere says."""
        shares = self._of(experts)
        if not any(share for share, _ in shares):
            self._others.start(experts, v)
            return
        ids = v.expert_ids.clone()
        for share, rows in shares:
            ids[rows].masked_fill_(ids[rows] >= share, -1)
        # First, since what it leaves on the host would queue behind the rows that go there.
        self._sent.sort(experts, ids, v)
        jobs = [
            self._exchange.job(self._cpu, experts, v.n, rows, share)
            for share, rows in shares
            if share < experts.gate.shape[0]
        ]
        self._jobs += [(experts.layer, job) for job in jobs]
        if jobs:
            with self._exchange.device.aside():
                self._exchange.send(v)
                for job in jobs:
                    self._exchange.device.launch(job)

    def finish(self, experts: Experts, v: Views) -> None:
        """As Elsewhere says. What was sent is added first."""
        shares = self._of(experts)
        if not any(share for share, _ in shares):
            self._others.finish(experts, v)
            return
        self._sent.add(experts, v)
        rest = [rows for share, rows in shares if share < experts.gate.shape[0]]
        if rest:
            self._exchange.device.join()
        for rows in rest:
            self._exchange.add(v, rows)

    def check(self) -> None:
        """After the step: raises RuntimeError where a layer's experts could not be computed."""
        errors = [(layer, error) for layer, job in self._jobs if (error := job.take_error())]
        if errors:
            raise RuntimeError("the experts of layer {} failed: {}".format(*errors[0]))

    def _of(self, experts: Experts) -> list[tuple[int, slice]]:
        """Share and rows of each span."""
        return [(self._shares.get(n, {}).get(experts.layer, 0), rows) for n, rows in self._spans]


def _sent(device: Device, experts: Experts) -> list[Weight]:
    """The stacks to send: those of the CPU, or the file's where the device cannot read them."""
    own: tuple[Weight, ...] = (experts.gate, experts.up, experts.down)
    return [
        w if device.reads(w.layout, w.ggml_type) else blocks
        for w, blocks in zip(own, experts.blocks, strict=True)
    ]
