"""The layers of a model parted among GPUs, so that as many of the routed experts as can be lie on one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from ktd.model.placement import GpuNeeds, Placement


@dataclass(frozen=True, slots=True)
class Pins:
    """What placement rules say: layers whose routed experts are to be on a GPU (True) or in memory (False),
    and the GPUs of layers."""

    experts: Mapping[int, bool] = field(default_factory=dict)
    gpus: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, order=True)
class _Part:
    """Some first layers on some first GPUs. The best is the largest: of those that hold most bytes of experts
    the one on the fewest GPUs, and of those the one with the most room for more tokens in its fullest GPU."""

    held: int
    unused: int
    tokens: float
    placement: Placement = field(compare=False)


def split(needs: GpuNeeds, budgets: Mapping[str, int], pages: int, pins: Pins) -> Placement | None:
    """The best placement in which each GPU keeps within its budget, with its layers' part of a cache of
    `pages`; None where there is none. Each GPU in use has layers in a row, in the order of `budgets`."""
    devices, count = list(budgets), len(needs.dense)

    @cache
    def best(gpus: int, end: int) -> _Part | None:
        """Layers before `end` on the first so many GPUs."""
        if gpus == 0:
            return _Part(0, 0, float("inf"), Placement()) if end == 0 else None
        device, found = devices[gpus - 1], list[_Part]()
        for first in range(end, -1, -1):
            before = best(gpus - 1, first)
            if before is None:
                continue
            if first == end:
                found.append(_Part(before.held, before.unused + 1, before.tokens, before.placement))
            else:
                part = _with(before, needs, device, budgets[device], range(first, end), pages, pins)
                found += [part] if part else []
        return max(found, default=None)

    whole = best(len(devices), count)
    return whole.placement if whole else None


def cache_room(
    needs: GpuNeeds, budgets: Mapping[str, int], placement: Placement, pins: Pins
) -> tuple[int, int]:
    """Bytes for a cache of all layers, of which each GPU holds its layers' part: beside the experts that the
    rules put there, and beside all that may be there."""
    layers = len(needs.dense)
    rooms: list[tuple[int, int]] = []
    pinned = {layer for layer, on_gpu in pins.experts.items() if on_gpu}
    for device, stage in zip(placement.devices, placement.stages(layers), strict=True):
        room = budgets[device] - needs.of(stage, pinned, 0).total
        free = sum(needs.experts[layer] for layer in stage if layer not in pins.experts)
        rooms.append((room * layers // len(stage), max(room - free, 0) * layers // len(stage)))
    return min(room for room, _ in rooms), min(spare for _, spare in rooms)


def _with(
    before: _Part, needs: GpuNeeds, device: str, budget: int, layers: range, pages: int, pins: Pins
) -> _Part | None:
    """`before`, and `layers` on `device`; None where that is too small or the rules name another."""
    if any(pins.gpus.get(layer, device) != device for layer in layers):
        return None
    experts = _experts(needs, budget, layers, pages, pins)
    if experts is None:
        return None
    taken = needs.of(layers, experts, pages)
    tokens = (budget - taken.total) / len(layers)
    place = before.placement
    return _Part(
        before.held + taken.experts,
        before.unused,
        min(before.tokens, tokens),
        Placement(
            (*place.devices, device),
            place.expert_layers_on_gpu | experts,
            (*place.cuts, layers.start) if place.devices else (),
        ),
    )


def _experts(needs: GpuNeeds, budget: int, layers: range, pages: int, pins: Pins) -> frozenset[int] | None:
    """The layers whose routed experts `budget` holds beside all else of `layers`; None where even those that
    the rules put there are too many."""
    chosen = {layer for layer in layers if pins.experts.get(layer)}
    free = [layer for layer in layers if needs.experts[layer] and layer not in pins.experts]
    room = budget - needs.of(layers, chosen, pages).total
    if room < 0:
        return None
    for layer in free[:-1]:
        room -= needs.experts[layer]
        if room < 0:
            return frozenset(chosen)
        chosen.add(layer)
    # With the last of them the buffers go that send experts from memory.
    if free and needs.of(layers, {*chosen, free[-1]}, pages).total <= budget:
        chosen.add(free[-1])
    return frozenset(chosen)
