"""Routed experts on the CPU under a graph on a GPU: hidden states, choice and weights go there in one copy,
the sum comes back in another, and the GPU computes the shared experts meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from ktd.model.config import ModelConfig
from ktd.model.device import Device
from ktd.model.fetching import Fetching
from ktd.model.ffn import Experts
from ktd.model.workspace import Views, expert_floats, expert_inputs, of_experts
from ktd_kernels import Cpu, MoeJob, MoeSequence

# Seconds without a question after which the device is asked whether it still works.
_PATIENCE = 0.2
_ALL = slice(None)


def row_parts(n: int, parts: int) -> list[slice]:
    """n rows as one part, or as two of which the first is the larger by one row or none."""
    return [slice(0, n)] if parts == 1 else [slice(0, n - n // 2), slice(n - n // 2, n)]


class Exchange:
    """Page-locked buffers for steps of up to `rows` rows.

    While `idle` no experts are computed: for steps that only warm the device up.
    """

    def __init__(self, device: Device, config: ModelConfig, rows: int) -> None:
        used = config.moe.used if config.moe else 0
        self.device = device
        self.idle = False
        self.used = used
        self._hidden = config.hidden
        self._sent = device.pinned((expert_floats(rows, config.hidden, used),))
        self._sums = device.pinned((rows, config.hidden))

    def send(self, v: Views) -> None:
        """Device to host; not awaited."""
        self._from(v.n, v.start).copy_(v.to_experts, non_blocking=True)

    def host(self, n: int, start: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """On the host, of n rows from `start` on: hidden states [n, hidden], ids and weights [n, used], sums
        [n, hidden]."""
        inputs = expert_inputs(self._from(n, start), n, self._hidden, self.used)
        return *inputs, self._sums[start : start + n]

    def job(
        self,
        cpu: Cpu,
        experts: Experts,
        n: int,
        rows: slice = _ALL,
        first: int = 0,
        start: int = 0,
        here: int | None = None,
    ) -> MoeJob:
        """From `rows` of the host's n rows from `start` on to their sums, by the experts from `first` on, and
        of each row by the first `here` it has."""
        h, ids, weights, sums = (tensor[rows].numpy() for tensor in self.host(n, start))
        return MoeJob(cpu, experts.gate, experts.up, experts.down, h, ids, weights, sums, first, here)

    def add(self, v: Views, rows: slice = _ALL) -> None:
        """Adds the sums of `rows` of v, which are on the host, to v.x; not awaited."""
        self.device.collect(self._sums[v.start : v.start + v.n][rows], None, v.x[rows])

    def post(self, v: Views, flag: torch.Tensor) -> None:
        """Device to host, told by `flag`."""
        self.device.post(v.to_experts, self._from(v.n, v.start), flag)

    def collect(self, v: Views, flag: torch.Tensor) -> None:
        """Adds the sums to v.x once `flag` is set on the host."""
        self.device.collect(self._sums[v.start : v.start + v.n], flag, v.x)

    def _from(self, n: int, start: int) -> torch.Tensor:
        part: torch.Tensor = of_experts(self._sent, n, start, self._hidden, self.used)
        return part


class MailedExperts:
    """For captured steps: the device leaves its rows on the host and goes on; the thread that has started the
    step computes them, layer by layer and in each one part of the rows after the other, and the device takes
    the sums when it needs them. Meanwhile it computes what `fetching` leaves to it."""

    def __init__(
        self, exchange: Exchange, cpu: Cpu, layers: Sequence[Experts], fetching: Fetching, parts: int
    ) -> None:
        """`parts`: how many `row_parts` the rows of a step come in, one or two."""
        self._exchange = exchange
        self._cpu = cpu
        self._layers = layers
        self._fetching = fetching
        self._parts = parts
        self._place = {experts.layer: place * parts for place, experts in enumerate(layers)}
        self._flags = exchange.device.pinned((len(layers) * parts, 2, 16), torch.int32)
        self._runs: dict[tuple[int, int], tuple[list[MoeJob], MoeSequence]] = {}

    def start(self, experts: Experts, v: Views) -> None:
        """As Elsewhere says."""
        self._exchange.post(v, self._flag(experts, v, 0))

    def finish(self, experts: Experts, v: Views) -> None:
        """As Elsewhere says."""
        self._fetching.add(experts, v)
        self._exchange.collect(v, self._flag(experts, v, 1))

    def rehearse(self, v: Views) -> None:
        """All that a capture must not be the first to do."""
        self._flags.fill_(1)
        for experts in self._layers[:1]:
            self.start(experts, v)
            self.finish(experts, v)

    def run(self, step: Callable[[], None], n: int) -> None:
        """Launches a captured step of `n` rows and computes what it asks for. Raises RuntimeError where a
        layer's experts could not be computed, or the device stopped asking."""
        jobs, sequence = self._runs.get((n, self._fetching.count)) or self._prepare(n)
        sequence.begin()
        try:  # whatever ends the step, the device is not left waiting
            step()
            while not sequence.serve(_PATIENCE):
                if not self._exchange.device.busy():
                    raise RuntimeError("the device ended the step before all its experts were asked for")
        finally:
            sequence.release()
        errors = [(place, error) for place, job in enumerate(jobs) if (error := job.take_error())]
        for place, error in errors[:1]:
            layer = self._layers[place // self._parts].layer
            raise RuntimeError(f"the experts of layer {layer} failed: {error}")

    def _flag(self, experts: Experts, v: Views, which: int) -> torch.Tensor:
        place = self._place[experts.layer] + (v.start > 0)
        return self._flags[place, which, :1]

    def _prepare(self, n: int) -> tuple[list[MoeJob], MoeSequence]:
        jobs = [
            self._exchange.job(
                self._cpu,
                experts,
                part.stop - part.start,
                start=part.start,
                here=self._fetching.here(experts),
            )
            for experts in self._layers
            for part in row_parts(n, self._parts)
        ]
        run = self._runs[n, self._fetching.count] = jobs, MoeSequence(jobs, self._flags.numpy())
        return run


class PromptExperts:
    """The calling thread computes and launches in turns; for chunks of a prompt, whose progress is told layer
    by layer, and, with `fetching`, for drawn rows too many for a captured step."""

    def __init__(self, exchange: Exchange, cpu: Cpu, fetching: Fetching | None = None) -> None:
        self._exchange = exchange
        self._cpu = cpu
        self._fetching = fetching

    def start(self, experts: Experts, v: Views) -> None:
        """As Elsewhere says."""
        with self._exchange.device.aside():
            self._exchange.send(v)

    def finish(self, experts: Experts, v: Views) -> None:
        """As Elsewhere says."""
        here = None
        if self._fetching is not None:
            here = self._fetching.here(experts)
            self._fetching.add(experts, v)
        self._exchange.device.finish_aside()
        if not self._exchange.idle:
            h, ids, weights, sums = (tensor.numpy() for tensor in self._exchange.host(v.n, v.start))
            ids, weights = (np.ascontiguousarray(array[:, :here]) for array in (ids, weights))
            self._cpu.moe(experts.gate, experts.up, experts.down, h, ids, weights, sums)
        self._exchange.add(v)

    def check(self) -> None:
        """After the step: nothing, as `finish` has raised what went wrong."""
