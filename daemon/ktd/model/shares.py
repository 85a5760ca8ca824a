"""What share of a layer's experts is sent to the GPU, measured when a model is loaded: by how many rows of a
prompt there are, and by the types of the layer.

Neither side can be measured alone: they read the same memory, and what is sent for the next layer is on its
way while the attention of one is computed. So shares are tried in place, in the step of a prompt through some
layers, and the fastest is kept.
"""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ktd.model.batch import Batch
from ktd.model.device import Device
from ktd.model.exchange import Exchange
from ktd.model.ffn import Elsewhere, Experts
from ktd.model.streaming import SentExperts, SplitExperts
from ktd.model.workspace import Views
from ktd_kernels import Cpu

log = logging.getLogger(__name__)

Ids = npt.NDArray[np.int64]
#: Takes the rows of a prompt through these layers, with their experts elsewhere.
Excerpt = Callable[[Sequence[int], Elsewhere], None]

# The least number of rows for which a share is measured; the others are this times powers of two.
_LEAST_ROWS = 64
# Layers in a row that are timed of those that are alike. More take longer, and would give the same.
_TIMED_LAYERS = 3
# Each share is timed so often, and the best taken: the first time may compile kernels.
_RUNS = 2


class Shares:
    """Prompts are read in parts of `rows` tokens. For the rows of parts of about n tokens `found[n]` experts
    of each layer are sent, and `experts` computes them; rows of parts for which there is no such n are the
    CPU's alone.

    A row's part is decided by its place in its own request, so that its bits do not depend on what shares its
    step.
    """

    def __init__(
        self,
        device: Device,
        cpu: Cpu,
        exchange: Exchange,
        others: Elsewhere,
        layers: Sequence[Experts],
        rows: int,
    ) -> None:
        self._device, self._cpu, self._exchange = device, cpu, exchange
        self._others, self._layers, self._rows = others, layers, rows
        self._most = _LEAST_ROWS << (rows // _LEAST_ROWS).bit_length() >> 1  # the greatest n
        self.found: dict[int, dict[int, int]] = {}
        self.experts: SplitExperts | None = None

    def measure(self, sent: SentExperts, excerpt_of: Callable[[int], Excerpt]) -> None:
        """Finds the shares of the layers, all of which `sent` has, in excerpts of prompts of n rows, each of
        which `excerpt_of` prepares; takes seconds."""
        if not self._layers or self._rows < _LEAST_ROWS:
            return
        sent.reserve()
        alike: dict[Any, list[Experts]] = defaultdict(list)
        for layer in self._layers:
            alike[tuple((w.layout, w.ggml_type) for w in (layer.gate, layer.up, layer.down))].append(layer)
        found: dict[int, dict[int, int]] = defaultdict(dict)
        for layers in alike.values():
            timed, rest = layers[:_TIMED_LAYERS], layers[_TIMED_LAYERS:]
            for layer in timed:
                sent.lock(layer)
            shares = self._measured(sent, timed, excerpt_of)
            for layer in rest if shares else ():
                sent.lock(layer)
            for n, share in shares.items():
                found[n] |= dict.fromkeys((layer.layer for layer in layers), share)
        self.found = dict(sorted(found.items()))
        self.experts = self._split(sent, self.found) if found else None
        self._tell()

    def _tell(self) -> None:
        """Logs what was found."""
        where, count = self._device.device, self._layers[0].gate.shape[0]
        if not self.found:
            log.info("No experts are sent to %s for prompts: it would take longer", where)
        for n, shares in self.found.items():
            each = sorted({shares.get(layer.layer, 0) for layer in self._layers})
            some = f"{each[0]}" if len(each) == 1 else f"{each[0]} to {each[-1]}"
            log.info(
                "Of prompts of about %d tokens %s of %d experts a layer are sent to %s", n, some, count, where
            )

    def of(self, batch: Batch) -> Ids:
        """For each row of a prompt the n of its `experts`, or 0. No later row of a prompt has a greater n."""
        starts = batch.positions // self._rows * self._rows
        lengths = np.clip(batch.prompt - starts, 1, self._rows)
        nearest = np.minimum(2 ** np.rint(np.log2(lengths)).astype(np.int64), self._most)
        return np.where(np.isin(nearest, list(self.found)), nearest, 0)

    def _measured(
        self, sent: SentExperts, layers: Sequence[Experts], excerpt_of: Callable[[int], Excerpt]
    ) -> dict[int, int]:
        """Share of these layers' experts by number of rows: the one with which they take the least time."""
        count = layers[0].gate.shape[0]
        shares: dict[int, int] = {}
        sending, share, n = 0.0, 0, _LEAST_ROWS
        while n <= self._rows:
            seconds = self._trial(sent, layers, excerpt_of(n), n)
            if shares:
                # Twice the rows take the CPU up to twice the time, and the bus no longer than before: what is
                # left to the CPU for each that is sent is between half and all of what it was.
                share = round(count * share / (share + 0.75 * (count - share)))
                share, _ = _fastest(seconds, share, count)
                shares[n] = share  # from the first n on that is sent all are: `of` relies on that
            else:
                computing = seconds(0)
                sending = sending or seconds(count)  # few rows take the time of the bus
                share = round(count * computing / (computing + sending))
                share, least = _fastest(seconds, share, count) if share else (0, computing)
                if least < computing:
                    shares[n] = share
            n *= 2
        return shares

    def _split(self, sent: SentExperts, shares: dict[int, dict[int, int]]) -> SplitExperts:
        return SplitExperts(sent, shares, self._exchange, self._cpu, self._others)

    def _trial(
        self, sent: SentExperts, layers: Sequence[Experts], excerpt: Excerpt, n: int
    ) -> Callable[[int], float]:
        """Seconds that n rows take through the layers, by share."""
        numbers = [layer.layer for layer in layers]
        count, rng = layers[0].gate.shape[0], np.random.default_rng(0)
        chosen = np.argsort(rng.random((n, count), np.float32), axis=1)[:, : self._exchange.used]
        ids = torch.from_numpy(chosen.astype(np.int32)).to(self._device.device)

        def seconds(share: int) -> float:
            split = self._split(sent, {n: dict.fromkeys(numbers, share)})
            return min(self._seconds(split, ids, numbers, excerpt) for _ in range(_RUNS))

        return seconds

    def _seconds(
        self, split: SplitExperts, ids: torch.Tensor, layers: Sequence[int], excerpt: Excerpt
    ) -> float:
        n = len(ids)
        self._device.synchronize()
        start = time.perf_counter()
        split.begin([(n, slice(0, n))])
        excerpt(layers, _AtRandom(split, ids))
        self._device.synchronize()
        seconds = time.perf_counter() - start
        split.check()
        return seconds


class _AtRandom:
    """As Elsewhere says, for rows that choose the experts `ids`, int32 [n, used]: by themselves those that
    come from the embedding straight to a later layer might all choose the same few."""

    def __init__(self, experts: Elsewhere, ids: torch.Tensor) -> None:
        self._experts, self._ids = experts, ids

    def start(self, experts: Experts, v: Views) -> None:
        """As Elsewhere says."""
        v.expert_ids.copy_(self._ids)
        self._experts.start(experts, v)

    def finish(self, experts: Experts, v: Views) -> None:
        """As Elsewhere says."""
        self._experts.finish(experts, v)


def _fastest(seconds: Callable[[int], float], share: int, count: int) -> tuple[int, float]:
    """The share of 1 … count that takes the least of `seconds`, searched from `share` on by ever smaller
    steps, and what it takes. A step changes either side's work by at most a quarter."""
    taken = {share: seconds(share)}
    step = min(share, count - share) // 4
    for _ in range(3):
        step = max(step, 1)
        for tried in (share + step, share - step):
            if 1 <= tried <= count and tried not in taken:
                taken[tried] = seconds(tried)
            if taken.get(tried, math.inf) < taken[share]:
                share = tried
                break
        step //= 2
    return share, taken[share]
