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
from ktd.model.exchange import Exchange, MailedExperts, PromptExperts, row_parts
from ktd.model.fetching import Fetching
from ktd.model.ffn import Elsewhere
from ktd.model.inputs import GpuRows, Inputs
from ktd.model.ops import RowsPart
from ktd.model.placement import DRAWN_ROWS, Placement
from ktd.model.rope import rope_table
from ktd.model.shares import Excerpt, Shares
from ktd.model.source import WeightSource
from ktd.model.streaming import Span
from ktd.model.workspace import Views, Workspace
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
        self._graphs: dict[tuple[int, int], tuple[Callable[[], None], int]] = {}
        self.inputs = Inputs(device, rows, pages)
        self._workspace = Workspace(config, device)
        self._workspace.reserve(rows, logit_rows if self._last else 0)
        # Drawn rows are computed while prompts are under way: they have buffers of their own.
        drawn = min(logit_rows, DRAWN_ROWS)
        self.drawn_inputs = Inputs(device, drawn, pages)
        self._drawn_workspace = Workspace(config, device)
        self._drawn_workspace.reserve(drawn, drawn if self._last else 0)
        self.exchange = Exchange(device, config, rows)
        elsewhere = self._stack.elsewhere
        #: What of drawn rows' experts the device computes; `count` is to be the same from the first step on.
        self.fetching = Fetching(device, elsewhere, config.moe.used if config.moe else 0)
        self._mailed_experts = {
            parts: MailedExperts(self.exchange, self._cpu, elsewhere, self.fetching, parts)
            for parts in (1, 2)
        }
        self._drawn_experts = PromptExperts(self.exchange, self._cpu, self.fetching)
        self.prompt_experts = PromptExperts(self.exchange, self._cpu)
        self.shares = Shares(device, self._cpu, self.exchange, self.prompt_experts, self.sendable, rows)

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
        rows, v = self._enter(batch, width)
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

    def excerpt(self, batch: Batch, width: int, cache: LatentCache) -> Excerpt:
        """What some layers do in the step of a prompt, to be timed."""

        def run(layers: Sequence[int], experts: Elsewhere) -> None:
            rows, v = self._enter(batch, width)
            self._stack.forward(
                self.device.prompt, rows, cache, self._table, v, elsewhere=experts, only=layers
            )

        return run

    def _enter(self, batch: Batch, width: int) -> tuple[GpuRows, Views]:
        """Rows of prompts, and buffers with their hidden states."""
        n = len(batch.tokens)
        rows = self.inputs.send(n, width, len(batch.page_table))
        v = self._workspace.rows(n)
        v.x.copy_(self._hidden[:n], non_blocking=True)
        return rows, v

    def check(self) -> None:
        """After the step of a prompt: raises RuntimeError where a layer's experts could not be computed."""
        if self.shares.experts:
            self.shares.experts.check()

    def forget_captures(self) -> None:
        """Steps are no longer what was captured."""
        self._graphs.clear()

    def drawn(self, n: int, width: int, cache: LatentCache, parts: int = 1) -> None:
        """n drawn rows, by a captured graph if there is one, else in so many parts. Returns when the CPU's
        work is done; raises RuntimeError where a layer's experts could not be computed."""
        step, parts = self._graphs.get((n, width), (None, parts))
        if step is None:
            self._drawn_step(n, width, cache, self._drawn_experts, parts)
        else:
            self._mailed_experts[parts].run(step, n)

    def _drawn_step(self, n: int, width: int, cache: LatentCache, experts: Elsewhere, parts: int) -> None:
        """From the inputs on the host to what goes out, in so many parts of the rows; allocates nothing, and
        awaits nothing that `experts` do not."""
        ops, workspace = self.device.rows, self._drawn_workspace
        rows = self.drawn_inputs.send(n, width)
        v = workspace.rows(n)
        v.x.copy_(self._hidden[:n], non_blocking=True)
        in_parts = [
            (RowsPart.of(rows, part), workspace.rows(part.stop - part.start, part.start))
            for part in row_parts(n, parts)
        ]
        self._stack.forward_in_turns(ops, in_parts, cache, self._table, experts)
        if self._last:
            logits = self._drawn_workspace.logits(n)
            self._stack.head(ops, v, logits)
            self._logits[:n].copy_(logits, non_blocking=True)
        else:
            self._hidden[:n].copy_(v.x, non_blocking=True)

    @property
    def waits(self) -> bool:
        """Whether drawn rows wait for experts elsewhere."""
        return bool(self._stack.elsewhere)

    @property
    def mapped_bytes(self) -> int:
        """Bytes of experts elsewhere that are read from the file, or from what the system keeps of it."""
        weights = (w for e in self._stack.elsewhere for w in (e.gate, e.up, e.down))
        return sum(w.nbytes for w in weights if not w.copied)

    def rehearse(self) -> None:
        """Does what a capture must not be the first to do."""
        self._mailed_experts[1].rehearse(self._drawn_workspace.rows(1))
        self.device.synchronize()

    def capture(self, n: int, width: int, parts: int, cache: LatentCache) -> None:
        """Makes a graph of steps of n drawn rows in so many parts with page tables of a width, which have run
        once. It takes the place of one with other parts."""
        step = partial(self._drawn_step, n, width, cache, self._mailed_experts[parts], parts)
        self._graphs[n, width] = self.device.capture(step), parts
