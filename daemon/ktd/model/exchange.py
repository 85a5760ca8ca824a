"""Routed experts on the CPU under a graph on a GPU: hidden states, choice and weights go there in one copy,
the sum comes back in another, and the GPU computes the shared experts meanwhile."""

from __future__ import annotations

import torch

from ktd.model.config import ModelConfig
from ktd.model.device import Device
from ktd.model.ffn import Experts
from ktd.model.workspace import Views, expert_inputs
from ktd_kernels import Cpu, MoeJob


class Exchange:
    """Page-locked buffers for steps of up to `rows` rows, and the device's copy of what comes back.

    While `idle` no experts are computed: for steps that only warm the device up.
    """

    def __init__(self, device: Device, config: ModelConfig, rows: int) -> None:
        used = config.moe.used if config.moe else 0
        self.device = device
        self.idle = False
        self._hidden, self._used = config.hidden, used
        self._sent = device.pinned((rows * (config.hidden + 2 * used),))
        self._sums = device.pinned((rows, config.hidden))
        self._image = device.empty((rows, config.hidden))

    def send(self, v: Views) -> None:
        """Device to host; not awaited."""
        self._sent[: v.to_experts.numel()].copy_(v.to_experts, non_blocking=True)

    def fetch(self, n: int) -> torch.Tensor:
        """Host to device, not awaited: the sums [n, hidden]."""
        image = self._image[:n]
        image.copy_(self._sums[:n], non_blocking=True)
        return image

    def host(self, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """On the host: hidden states [n, hidden], ids [n, used], weights [n, used], sums [n, hidden]."""
        flat = self._sent[: n * (self._hidden + 2 * self._used)]
        return *expert_inputs(flat, n, self._hidden, self._used), self._sums[:n]

    def job(self, cpu: Cpu, experts: Experts, n: int, first: int = 0) -> MoeJob:
        """From the host's n rows to their sums, by the experts from `first` on."""
        h, ids, weights, sums = (tensor.numpy() for tensor in self.host(n))
        return MoeJob(cpu, experts.gate, experts.up, experts.down, h, ids, weights, sums, first)

    def sums(self, n: int) -> torch.Tensor:
        """On the device, after `fetch`."""
        return self._image[:n]


class StreamExperts:
    """The stream itself calls the CPU, so that a whole step can be one captured graph."""

    def __init__(self, exchange: Exchange, cpu: Cpu) -> None:
        self._exchange = exchange
        self._cpu = cpu
        self._jobs: dict[tuple[int, int], MoeJob] = {}

    def start(self, experts: Experts, v: Views) -> None:
        """As Elsewhere says."""
        with self._exchange.device.aside():
            self._exchange.send(v)
            if not self._exchange.idle:
                self._exchange.device.launch(self._job(experts, v.n))
            self._exchange.fetch(v.n)

    def finish(self, experts: Experts, v: Views) -> None:
        """As Elsewhere says."""
        self._exchange.device.join()
        v.x.add_(self._exchange.sums(v.n))

    def check(self) -> None:
        """After the step: raises RuntimeError where a layer's experts could not be computed."""
        errors = [(layer, error) for (layer, _), job in self._jobs.items() if (error := job.take_error())]
        if errors:
            raise RuntimeError("the experts of layer {} failed: {}".format(*errors[0]))

    def seconds(self) -> float:
        """Time that the CPU has spent on experts in all steps so far."""
        return sum(job.seconds for job in self._jobs.values())

    def _job(self, experts: Experts, n: int) -> MoeJob:
        key = (experts.layer, n)
        if key not in self._jobs:
            self._jobs[key] = self._exchange.job(self._cpu, experts, n)
        return self._jobs[key]


class PromptExperts:
    """The calling thread computes; for chunks of a prompt, whose progress is told layer by layer."""

    def __init__(self, exchange: Exchange, cpu: Cpu) -> None:
        self._exchange = exchange
        self._cpu = cpu

    def start(self, experts: Experts, v: Views) -> None:
        """As Elsewhere says."""
        with self._exchange.device.aside():
            self._exchange.send(v)

    def finish(self, experts: Experts, v: Views) -> None:
        """As Elsewhere says."""
        self._exchange.device.finish_aside()
        if not self._exchange.idle:
            h, ids, weights, sums = (tensor.numpy() for tensor in self._exchange.host(v.n))
            self._cpu.moe(experts.gate, experts.up, experts.down, h, ids, weights, sums)
        v.x.add_(self._exchange.fetch(v.n))

    def check(self) -> None:
        """After the step: nothing, as `finish` has raised what went wrong."""
