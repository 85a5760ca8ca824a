"""The graph on a GPU, with the routed experts of some or all layers on the CPU.

A step's rows fall in two kinds that are computed one after the other. Rows of prompts run op by op, in the
arithmetic for many rows. Rows that the model has drawn, at most 64 at a time, run in the arithmetic in which
a row's bits do not depend on its company, as one captured graph for each number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import numpy.typing as npt
import psutil
import torch

from ktd.cache import LatentCache
from ktd.errors import DeviceLost, SettingsError
from ktd.model.batch import Batch, Piece
from ktd.model.config import ModelConfig
from ktd.model.deepseek import Stack, Tick, Wanted
from ktd.model.device import Device
from ktd.model.exchange import Exchange, PromptExperts, StreamExperts
from ktd.model.ffn import Elsewhere
from ktd.model.inputs import Inputs, table_width
from ktd.model.placement import Placement
from ktd.model.rope import rope_table
from ktd.model.source import WeightSource
from ktd.model.streaming import StreamedExperts, crossover
from ktd.model.workspace import Workspace
from ktd_kernels import Cpu

F32 = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
# Rows whose bits do not depend on their company; of these numbers the first so many are captured.
_DRAWN_ROWS = 64
_CAPTURED_ROWS = 16
# Tokens of context for which attention is launched: each step takes the least that holds its own.
_CONTEXTS = (4096, 16384, 65536)


class HybridModel:
    """As `ktd.model.Model` says. A step that is larger than any before, or over another cache, is preceded by
    a `reserve`."""

    def __init__(
        self,
        source: WeightSource,
        config: ModelConfig,
        cpu: Cpu,
        device: Device,
        placement: Placement,
        positions: int,
    ) -> None:
        self.config = config
        self.device: str | None = str(device.device)
        self._cpu = cpu
        self._device = device
        self._positions = positions
        self._embedding = source.matrix("token_embd.weight", config.vocab_size, config.hidden)
        with self._using():
            there = source.on(device)
            self._stack = Stack(
                there, config, lambda layer: there if placement.experts_on_gpu(layer) else source
            )
            self._table = device.upload(rope_table(config, positions))
            device.settle()
        self._cache: LatentCache | None = None
        self._rows = self._logit_rows = 0

    def reserve(self, rows: int, logit_rows: int, cache: LatentCache) -> None:
        """As Model says."""
        device, config = self._device, self.config
        with self._using():
            self._graphs: dict[tuple[int, int], Callable[[], None]] = {}
            self._cache = cache
            self._rows, self._logit_rows = max(rows, logit_rows), logit_rows
            pages = -(-self._positions // cache.page_size)
            self._widths = [*(c // cache.page_size for c in _CONTEXTS if c < self._positions), pages]
            self._inputs = Inputs(device, self._rows, pages)
            self._workspace = Workspace(config, device)
            self._workspace.reserve(self._rows, logit_rows)
            self._embedded = device.pinned((self._rows, config.hidden))
            self._logits = device.pinned((logit_rows, config.vocab_size))
            self._exchange = Exchange(device, config, self._rows)
            self._stream_experts = StreamExperts(self._exchange, self._cpu)
            self._prompt_experts = PromptExperts(self._exchange, self._cpu)
            self._warm_up(cache)
            self._prepare_streaming()

    def forward(self, batch: Batch, cache: LatentCache, tick: Tick | None = None) -> F32:
        """As Model says."""
        wanted = len(batch.logit_rows)
        if cache is not self._cache or len(batch.tokens) > self._rows or wanted > self._logit_rows:
            self.reserve(max(len(batch.tokens), self._rows), max(wanted, self._logit_rows, 1), cache)
        try:
            with self._device.work():
                self._device.synchronize()  # a step that was given up may still be running
                return self._forward(batch, cache, tick)
        except RuntimeError as error:
            self._check_device(error)
            raise

    def _check_device(self, cause: RuntimeError) -> None:
        """Raises DeviceLost where the device answers nothing but its last error."""
        try:
            self._device.synchronize()
        except RuntimeError:
            raise DeviceLost(f"{self.device} gives no more results: {cause}") from cause

    def _forward(self, batch: Batch, cache: LatentCache, tick: Tick | None) -> F32:
        wanted = len(batch.logit_rows)
        parts = []
        streamed, prompt, drawn = self._kinds(batch)
        for rows, experts in ((streamed, self._streamed_experts), (prompt, self._prompt_experts)):
            if len(rows):
                part = batch.take(rows)
                parts.append((rows[part.logit_rows], self._prompt(part, cache, experts, tick)))
        most = min(_DRAWN_ROWS, self._logit_rows)
        for start in range(0, len(drawn), most):
            rows = drawn[start : start + most]
            part = batch.take(rows)
            logits = self._drawn(part, cache)
            if len(part.logit_rows) == wanted == len(rows):
                return logits
            parts.append((rows[part.logit_rows], logits[part.logit_rows]))
        result = np.empty((wanted, self.config.vocab_size), np.float32)
        for rows, logits in parts:
            result[np.searchsorted(batch.logit_rows, rows)] = logits
        return result

    def _kinds(self, batch: Batch) -> tuple[Ids, Ids, Ids]:
        """Rows of prompts to the nearest whole block, which stream where that is faster; other rows of
        prompts; rows that were drawn. Decided by a token's place in its own request alone."""
        drawn = batch.positions >= batch.prompt
        streamed = np.zeros_like(drawn)
        if self._block:
            blocks = (batch.prompt + self._block // 2) // self._block
            streamed = (batch.positions < blocks * self._block) & ~drawn
        return np.flatnonzero(streamed), np.flatnonzero(~(streamed | drawn)), np.flatnonzero(drawn)

    def _prompt(self, batch: Batch, cache: LatentCache, experts: Elsewhere | None, tick: Tick | None) -> F32:
        """Logits of the wanted rows of a batch of prompts, copied."""
        ops, n = self._device.prompt, len(batch.tokens)
        width = self._fill(batch, cache)
        rows = self._inputs.send(n, width, len(batch.page_table))
        v = self._workspace.rows(n)
        v.x.copy_(self._embedded[:n], non_blocking=True)
        numbers = torch.as_tensor(batch.logit_rows, device=self._device.device)
        wanted = Wanted(numbers, self._workspace.rows(len(numbers)))
        self._stack.forward(ops, rows, cache, self._table, v, wanted, experts, tick)
        if wanted.v.n:
            logits = self._workspace.logits(wanted.v.n)
            self._stack.head(self._device.rows, wanted.v, logits)
            self._logits[: wanted.v.n].copy_(logits, non_blocking=True)
        self._device.synchronize()
        copied: F32 = self._logits[: wanted.v.n].numpy().copy()
        return copied

    def _drawn(self, batch: Batch, cache: LatentCache) -> F32:
        """Logits of all rows of a batch of drawn tokens; overwritten by the next call."""
        n = len(batch.tokens)
        width = self._fill(batch, cache)
        step = self._graphs.get((n, width)) or (lambda: self._drawn_step(n, width, cache))
        step()
        self._device.synchronize()
        self._stream_experts.check()
        logits: F32 = self._logits[:n].numpy()
        return logits

    def _drawn_step(self, n: int, width: int, cache: LatentCache) -> None:
        """From the inputs on the host to the logits on the host; awaits and allocates nothing."""
        ops = self._device.rows
        rows = self._inputs.send(n, width)
        v = self._workspace.rows(n)
        v.x.copy_(self._embedded[:n], non_blocking=True)
        self._stack.forward(ops, rows, cache, self._table, v, elsewhere=self._stream_experts)
        logits = self._workspace.logits(n)
        self._stack.head(ops, v, logits)
        self._logits[:n].copy_(logits, non_blocking=True)

    def _fill(self, batch: Batch, cache: LatentCache) -> int:
        """Writes the batch to the host's inputs; returns the width of its page table."""
        width = table_width(batch, cache.page_size, self._widths)
        self._inputs.fill(batch, width)
        self._cpu.embed(self._embedding, batch.tokens, self._embedded[: len(batch.tokens)].numpy())
        return width

    def _prepare_streaming(self) -> None:
        """Rows of a prompt's block from which a layer is sent faster than computed on the CPU."""
        self._block = 0
        self._streamed_experts: StreamedExperts | None = None
        # The last layer has few rows: those whose logits are wanted.
        layers = [e for e in self._stack.elsewhere if e.layer < self.config.layers - 1]
        if not layers or not all(layer.blocks for layer in layers):
            return
        streamed = StreamedExperts(self._device, layers, self._prompt_experts)
        if streamed.file_bytes > psutil.virtual_memory().available:
            return  # what would be read from the disk for every chunk is no faster
        streamed.prepare()
        self._streamed_experts = streamed
        self._block = crossover(self._cpu, self._exchange, streamed, layers[0], self._rows)

    def _warm_up(self, cache: LatentCache) -> None:
        """Compiles and allocates all that steps will need, and captures those of few rows."""
        sizes = range(1, min(self._logit_rows, _CAPTURED_ROWS) + 1)
        shapes = [(n, width) for n in sizes for width in self._widths]

        def batch(n: int) -> Batch:
            return Batch.of([Piece([0], 0, [0], 0)] * n, cache.page_size)

        first_page = cache.storage[:, 0].clone()  # it is written to
        self._exchange.idle = True
        self._prompt(batch(self._rows), cache, self._prompt_experts, None)
        for n, width in reversed(shapes):  # scratch memory is taken by the largest
            self._fill(batch(n), cache)
            self._drawn_step(n, width, cache)
            self._device.synchronize()
        self._exchange.idle = False
        cache.storage[:, 0] = first_page
        for shape in shapes:
            self._graphs[shape] = self._device.capture(partial(self._drawn_step, *shape, cache))

    @contextmanager
    def _using(self) -> Iterator[None]:
        try:
            with self._device.work():
                yield
        except torch.OutOfMemoryError as error:
            raise SettingsError(
                f"The memory of {self.device} does not hold what was planned for it: stop other programs that"
                " use it, or lower --vram or --context."
            ) from error
