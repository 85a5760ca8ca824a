"""Experts of drawn rows that the device computes while the CPU computes the others: it reads their weights
where the CPU has them, as the CPU, bound by arithmetic, leaves bandwidth of the memory over."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ktd.model.device import Device, Fetched
from ktd.model.ffn import Experts
from ktd.model.placement import GROUP_BYTES
from ktd.model.workspace import Views


class Fetching:
    """Of each row's experts, in a layer of `layers` whose weights allow it, the last `count` in the row's own
    order are the device's. It is the same number whatever rows a step has, so that a row's bits do not depend
    on its company."""

    def __init__(self, device: Device, layers: Sequence[Experts], used: int) -> None:
        """`used`: how many experts a row has."""
        self.count = 0
        self._used = used
        self._fetched: dict[int, Fetched] = {}
        readable = [experts for experts in layers if _readable(device, experts)]
        room = device.empty((GROUP_BYTES if readable else 0,), torch.uint8)
        for experts in readable:
            stacks = (experts.gate, experts.up, experts.down)
            for weight in stacks:
                device.lock(weight)
            fetched = device.fetched(stacks, room)
            if fetched is not None and fetched.slots:
                self._fetched[experts.layer] = fetched

    @property
    def most(self) -> int:
        """The greatest sensible `count`."""
        slots = min((fetched.slots for fetched in self._fetched.values()), default=0)
        return min(slots, self._used // 2)

    def here(self, experts: Experts) -> int:
        """How many of a row's experts are left to the CPU."""
        return self._used - (self.count if experts.layer in self._fetched else 0)

    def add(self, experts: Experts, v: Views) -> None:
        """Adds the device's part to v.x; not awaited."""
        here = self.here(experts)
        if here < self._used:
            self._fetched[experts.layer].add(v.h, v.expert_ids, v.expert_weights, here, v.x)


def _readable(device: Device, experts: Experts) -> bool:
    """Whether these are packed, in layouts that the device knows."""
    stacks = (experts.gate, experts.up, experts.down)
    return all(w.layout != "file" and device.reads(w.layout, w.ggml_type) for w in stacks)
