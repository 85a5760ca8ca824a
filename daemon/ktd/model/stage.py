"""Layers in a row on one GPU, with their part of the cache: what a step does there, from the hidden states
that come in to those that go out, or to the logits.

Between stages hidden states pass through page-locked memory of the host, which every GPU reaches: a copy out
and one in, some microseconds for a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from ktd.cache import LatentCache
from ktd.model.batch import Batch
from ktd.model.config import ModelConfig
from ktd.model.deepseek import Stack, Tick, Wanted
from ktd.model.device import Device
from ktd.model.exchange import Exchange, MailedExperts, PromptExperts
from ktd.model.ffn import Elsewhere
from ktd.model.inputs import Inputs
from ktd.model.placement import DRAWN_ROWS, Placement
from ktd.model.rope import rope_table
from ktd.model.shares import Shares
from ktd.model.source import WeightSource
from ktd.model.streaming import Span
from ktd.model.workspace import Workspace
from ktd_kernels import Cpu


class Stage:
    """`layers` of a model on `device`, and the head behind the last of all. All is done within
    `device.work()`, the work of a step within `turn`."""

    def __init__(
        self,
        source: WeightSource,
        config: ModelConfig,
        cpu: Cpu,
        device: Device,
        layers: range,
        placement: Placement,
        positions: int,
    ) -> None:
        self.device, self.layers = device, layers
        self.before: Stage | None = None
        self._config, self._cpu = config, cpu
        there = source.on(device)
        self._stack = Stack(
            there, config, lambda layer: there if placement.experts_on_gpu(layer) else source, layers
        )
        self._table = device.upload(rope_table(config, positions))
        self._last = layers.stop == config.layers
        #: Routed experts on the CPU that can be sent and have many rows: the last layer has few, those whose
        #: logits are wanted.
        self.sendable = [e for e in self._stack.elsewhere if e.blocks and e.layer < config.layers - 1]
        device.settle()

    def reserve(
        self, rows: int, logit_rows: int, pages: int, hidden: torch.Tensor, logits: torch.Tensor
    ) -> None:
        """Allocates for steps of `rows` rows, of which `logit_rows` want logits, and sequences of up to
        `pages`. `hidden` [rows, hidden] and `logits` [logit_rows, vocab] on the host take what comes in and
        what goes out."""
        device, config = self.device, self._config
        self._hidden, self._logits = hidden, logits
        self._graphs: dict[tuple[int, int], Callable[[], None]] = {}
        self.inputs = Inputs(device, rows, pages)
        self._workspace = Workspace(config, device)
        self._workspace.reserve(rows, logit_rows if self._last else 0)
        # Drawn rows are computed while prompts are under way: they have buffers of their own.
        drawn = min(logit_rows, DRAWN_ROWS)
        self.drawn_inputs = Inputs(device, drawn, pages)
        self._drawn_workspace = Workspace(config, device)
        self._drawn_workspace.reserve(drawn, drawn if self._last else 0)
        self.exchange = Exchange(device, config, rows)
        self._mailed_experts = MailedExperts(self.exchange, self._cpu, self._stack.elsewhere)
        self.prompt_experts = PromptExperts(self.exchange, self._cpu)
        self.shares = Shares(
            device, self._cpu, self.exchange, self._workspace, self.prompt_experts, self.sendable, rows
        )

    @contextmanager
    def turn(self) -> Iterator[None]:
        """The device's part of a step: waits for what the stage before was given."""
        with self.device.work():
            if self.before is not None:
                self.device.follow(self.before.device)
            yield

    def prompt(
        self, batch: Batch, width: int, cache: LatentCache, spans: Sequence[Span], tick: Tick | None
    ) -> None:
        """Rows of prompts, in spans of one number by `Shares.of`."""
        ops, n = self.device.prompt, len(batch.tokens)
        rows = self.inputs.send(n, width, len(batch.page_table))
        v = self._workspace.rows(n)
        v.x.copy_(self._hidden[:n], non_blocking=True)
        experts = self.shares.experts or self.prompt_experts
        if self.shares.experts:
            self.shares.experts.begin(spans)
        if not self._last:
            self._stack.forward(ops, rows, cache, self._table, v, None, experts, tick)
            self._hidden[:n].copy_(v.x, non_blocking=True)
            return
        numbers = torch.as_tensor(batch.logit_rows, device=self.device.device)
        wanted = Wanted(numbers, self._workspace.rows(len(numbers)))
        self._stack.forward(ops, rows, cache, self._table, v, wanted, experts, tick)
        if wanted.v.n:
            logits = self._workspace.logits(wanted.v.n)
            self._stack.head(self.device.rows, wanted.v, logits)
            self._logits[: wanted.v.n].copy_(logits, non_blocking=True)

    def check(self) -> None:
        """After the step of a prompt: raises RuntimeError where a layer's experts could not be computed."""
        if self.shares.experts:
            self.shares.experts.check()

    def drawn(self, n: int, width: int, cache: LatentCache) -> None:
        """n drawn rows, by a captured graph if there is one. Returns when the CPU's part is done; raises
        RuntimeError where a layer's experts could not be computed."""
        step = self._graphs.get((n, width))
        if step is None:
            self._drawn_step(n, width, cache, self.prompt_experts)
        else:
            self._mailed_experts.run(step, n)

    def _drawn_step(self, n: int, width: int, cache: LatentCache, experts: Elsewhere) -> None:
        """From the inputs on the host to what goes out; allocates nothing, and awaits nothing that `experts`
        do not."""
        ops = self.device.rows
        rows = self.drawn_inputs.send(n, width)
        v = self._drawn_workspace.rows(n)
        v.x.copy_(self._hidden[:n], non_blocking=True)
        self._stack.forward(ops, rows, cache, self._table, v, elsewhere=experts)
        if self._last:
            logits = self._drawn_workspace.logits(n)
            self._stack.head(ops, v, logits)
            self._logits[:n].copy_(logits, non_blocking=True)
        else:
            self._hidden[:n].copy_(v.x, non_blocking=True)

    def capture(self, shapes: Sequence[tuple[int, int]], cache: LatentCache) -> None:
        """Makes graphs of steps of n drawn rows and page tables of a width, which have run once."""
        self._mailed_experts.rehearse(self._drawn_workspace.rows(1))
        self.device.synchronize()
        for shape in shapes:
            step = partial(self._drawn_step, *shape, cache, self._mailed_experts)
            self._graphs[shape] = self.device.capture(step)
