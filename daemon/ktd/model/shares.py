"""What share of a layer's experts is sent to the GPU, measured when a model is loaded: by how many rows of a
prompt there are, and by the types of the layer."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ktd.model.batch import Batch
from ktd.model.device import Device
from ktd.model.exchange import Exchange
from ktd.model.ffn import Elsewhere, Experts
from ktd.model.streaming import SentExperts, SplitExperts
from ktd.model.workspace import Views, Workspace
from ktd_kernels import Cpu

Ids = npt.NDArray[np.int64]

# The least number of rows for which a share is measured; the others are this times powers of two.
_LEAST_ROWS = 64


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
        workspace: Workspace,
        others: Elsewhere,
        layers: Sequence[Experts],
        rows: int,
    ) -> None:
        self._device, self._cpu, self._exchange = device, cpu, exchange
        self._workspace, self._others, self._layers, self._rows = workspace, others, layers, rows
        self._most = _LEAST_ROWS << (rows // _LEAST_ROWS).bit_length() >> 1  # the greatest n
        self.found: dict[int, dict[int, int]] = {}
        self.experts: SplitExperts | None = None

    def measure(self, sent: SentExperts) -> None:
        """Finds the shares of the layers, all of which `sent` has; takes seconds."""
        if not self._layers or self._rows < _LEAST_ROWS:
            return
        sent.reserve()
        alike: dict[Any, list[Experts]] = defaultdict(list)
        for layer in self._layers:
            alike[tuple((w.layout, w.ggml_type) for w in (layer.gate, layer.up, layer.down))].append(layer)
        found: dict[int, dict[int, int]] = defaultdict(dict)
        for first, *rest in alike.values():
            sent.lock(first)
            shares = self._measured(sent, first)
            for layer in rest if shares else ():
                sent.lock(layer)
            for n, share in shares.items():
                found[n] |= dict.fromkeys((layer.layer for layer in (first, *rest)), share)
        self.found = dict(found)
        self.experts = self._split(sent, self.found) if found else None

    def of(self, batch: Batch) -> Ids:
        """For each row of a prompt the n of its `experts`, or 0. No later row of a prompt has a greater n."""
        starts = batch.positions // self._rows * self._rows
        lengths = np.clip(batch.prompt - starts, 1, self._rows)
        nearest = np.minimum(2 ** np.rint(np.log2(lengths)).astype(np.int64), self._most)
        return np.where(np.isin(nearest, list(self.found)), nearest, 0)

    def _measured(self, sent: SentExperts, layer: Experts) -> dict[int, int]:
        """Share by number of rows: as much is sent as takes as long as the CPU takes for the rest."""
        count = layer.gate.shape[0]
        few = min(2 * _LEAST_ROWS, self._rows)
        sending = self._seconds(self._split(sent, {few: {layer.layer: count}}), layer, few)
        shares: dict[int, int] = {}
        computing, n = 0.0, _LEAST_ROWS
        while n <= self._rows:
            # Where computing is the longer of the two, it takes as long as there are rows.
            faster = computing > sending
            computing = 2 * computing if faster else self._seconds(self._others, layer, n)
            share = round(count * computing / (computing + sending))
            split = self._split(sent, {n: {layer.layer: share}})
            # From the first n on that is sent all are: `of` relies on that.
            if share and (shares or faster or self._seconds(split, layer, n) < computing):
                shares[n] = share
            n *= 2
        return shares

    def _split(self, sent: SentExperts, shares: dict[int, dict[int, int]]) -> SplitExperts:
        return SplitExperts(sent, shares, self._exchange, self._cpu, self._others)

    def _seconds(self, experts: Elsewhere, layer: Experts, n: int) -> float:
        """The better of two runs, the first of which may compile kernels."""
        v = self._workspace.rows(n)
        _fill(v, layer.gate.shape[0])
        taken = []
        for _ in range(2):
            self._device.synchronize()
            start = time.perf_counter()
            if isinstance(experts, SplitExperts):
                experts.begin([(n, slice(0, n))])
            experts.start(layer, v)
            experts.finish(layer, v)
            self._device.synchronize()
            taken.append(time.perf_counter() - start)
        return min(taken)


def _fill(v: Views, count: int) -> None:
    """Random rows that choose among `count` experts at random."""
    rng = np.random.default_rng(0)
    used = v.expert_ids.shape[1]
    chosen = np.argsort(rng.random((v.n, count), np.float32), axis=1)[:, :used]
    v.h.copy_(torch.from_numpy(rng.standard_normal(tuple(v.h.shape), np.float32)))
    v.expert_ids.copy_(torch.from_numpy(chosen.astype(np.int32)))
    v.expert_weights.fill_(1.0)
    v.x.zero_()
