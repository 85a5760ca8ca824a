"""The graph on one GPU or, in stages, on several, with the routed experts of some or all layers on the CPU.

A step's rows fall in two kinds that are computed one after the other. Rows of prompts run op by op, in the
arithmetic for many rows. Rows that the model has drawn, at most 64 at a time, run in the arithmetic in which
a row's bits do not depend on its company, as one captured graph for each number of rows and each stage.

Several drawn rows may come in two parts, so that both sides are busy: while the CPU computes the experts of
one, the GPU goes on with the other. Dense weights are then read twice, and so are experts that both parts
chose: it is measured when the model is loaded whether that pays.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise, product

import numpy as np
import numpy.typing as npt
import psutil
import torch

from ktd.cache import LatentCache
from ktd.errors import DeviceLost, SettingsError
from ktd.model.batch import Batch, Piece
from ktd.model.config import ModelConfig
from ktd.model.deepseek import Tick
from ktd.model.device import Device
from ktd.model.inputs import Inputs, table_width
from ktd.model.placement import CAPTURED_ROWS, DRAWN_ROWS, Placement
from ktd.model.shares import Excerpt
from ktd.model.source import WeightSource
from ktd.model.stage import Stage
from ktd.model.streaming import SentExperts, Span
from ktd_kernels import Cpu

F32 = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
log = logging.getLogger(__name__)
# Drawn rows of the steps by which it is found how many experts a device fetches.
_FETCHING_ROWS = (1, 4)
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
        devices: Sequence[Device],
        placement: Placement,
        positions: int,
    ) -> None:
        """`devices` are those of `placement`, in its order."""
        self.config = config
        self.cpu = cpu
        self._positions = positions
        self._embedding = source.matrix("token_embd.weight", config.vocab_size, config.hidden)
        self._stages: list[Stage] = []
        for device, layers in zip(devices, placement.stages(config.layers), strict=True):
            with _planned(device), device.work():
                stage = Stage(source, config, cpu, device, layers, placement, positions)
                stage.before = self._stages[-1] if self._stages else None
                self._stages.append(stage)
        self.devices: Sequence[str] = [str(s.device.device) for s in self._stages for _ in s.layers]
        self._cache: LatentCache | None = None
        self._rows = self._logit_rows = 0

    def reserve(self, rows: int, logit_rows: int, cache: LatentCache) -> None:
        """As Model says."""
        config, first = self.config, self._stages[0].device
        self._cache = cache
        self._rows, self._logit_rows = max(rows, logit_rows), logit_rows
        pages = -(-self._positions // cache.page_size)
        self._widths = [*(c // cache.page_size for c in _CONTEXTS if c < self._positions), pages]
        self._hidden = first.pinned((self._rows, config.hidden))
        self._logits = first.pinned((logit_rows, config.vocab_size))
        for stage in self._stages:
            with _planned(stage.device), stage.device.work():
                stage.reserve(self._rows, logit_rows, pages, self._hidden, self._logits)
        with _planned(*(stage.device for stage in self._stages)), self._first_pages_kept(cache):
            self._warm_up(cache)
            self._measure_shares(cache)
            for stage in self._stages:
                stage.device.settle()
            self._read_once(cache)

    def forward(self, batch: Batch, cache: LatentCache, tick: Tick | None = None) -> F32:
        """As Model says."""
        wanted = len(batch.logit_rows)
        if cache is not self._cache or len(batch.tokens) > self._rows or wanted > self._logit_rows:
            self.reserve(max(len(batch.tokens), self._rows), max(wanted, self._logit_rows, 1), cache)
        try:
            self._synchronize()  # a step that was given up, or that ticks, may still be running
            return self._forward(batch, cache, tick)
        except RuntimeError as error:
            self._check_devices(error)
            raise

    def _synchronize(self) -> None:
        """Waits for every device, and raises what went wrong on one."""
        for stage in self._stages:
            stage.device.synchronize()

    def _check_devices(self, cause: RuntimeError) -> None:
        """Raises DeviceLost where a device answers nothing but its last error."""
        for stage in self._stages:
            try:
                stage.device.synchronize()
            except RuntimeError:
                raise DeviceLost(f"{stage.device.device} gives no more results: {cause}") from cause

    def _forward(self, batch: Batch, cache: LatentCache, tick: Tick | None) -> F32:
        wanted = len(batch.logit_rows)
        parts = []
        drawn = np.flatnonzero(batch.positions >= batch.prompt)
        if len(drawn) < len(batch.tokens):
            reading, spans = self._prompts(batch)
            part = batch.take(reading)
            parts.append((reading[part.logit_rows], self._prompt(part, cache, spans, tick)))
        most = min(DRAWN_ROWS, self._logit_rows)
        for start in range(0, len(drawn), most):
            rows = drawn[start : start + most]
            part = batch.take(rows) if len(rows) < len(batch.tokens) else batch
            logits = self._drawn(part, cache)
            if len(part.logit_rows) == wanted == len(rows):
                return logits
            parts.append((rows[part.logit_rows], logits[part.logit_rows]))
        result = np.empty((wanted, self.config.vocab_size), np.float32)
        for rows, logits in parts:
            result[np.searchsorted(batch.logit_rows, rows)] = logits
        return result

    def _prompts(self, batch: Batch) -> tuple[Ids, list[Span]]:
        """Rows of prompts, those of one number by `Shares.of` side by side."""
        sizes = np.max([stage.shares.of(batch) for stage in self._stages], axis=0)
        reading = np.flatnonzero(batch.positions < batch.prompt)
        reading = reading[np.argsort(-sizes[reading], kind="stable")]
        numbers, starts = np.unique(-sizes[reading], return_index=True)
        bounds = pairwise((*starts.tolist(), len(reading)))
        return reading, [(-n, slice(*span)) for n, span in zip(numbers.tolist(), bounds, strict=True)]

    def _prompt(
        self, batch: Batch, cache: LatentCache, spans: Sequence[Span], tick: Tick | None = None
    ) -> F32:
        """Logits of the wanted rows of a batch of prompts, copied."""
        width = self._fill(batch, cache, [stage.inputs for stage in self._stages])
        for stage in self._stages:
            with stage.turn():
                stage.prompt(batch, width, cache, spans, tick)
        self._synchronize()
        for stage in self._stages:
            stage.check()
        copied: F32 = self._logits[: len(batch.logit_rows)].numpy().copy()
        return copied

    def _drawn(self, batch: Batch, cache: LatentCache) -> F32:
        """Logits of all rows of a batch of drawn tokens; overwritten by the next call."""
        n = len(batch.tokens)
        width = self._fill(batch, cache, [stage.drawn_inputs for stage in self._stages])
        self._drawn_steps(n, width, cache)
        self._synchronize()
        logits: F32 = self._logits[:n].numpy()
        return logits

    def _drawn_steps(self, n: int, width: int, cache: LatentCache, parts: int = 1) -> None:
        """From the inputs on the host to the logits there; what the last device does is not awaited. `parts`
        is for steps that are not captured."""
        for stage in self._stages:
            with stage.turn():
                stage.drawn(n, width, cache, parts)

    def _fill(self, batch: Batch, cache: LatentCache, inputs: Sequence[Inputs]) -> int:
        """Writes the batch to the host's inputs; returns the width of its page table."""
        width = table_width(batch, cache.page_size, self._widths)
        for each in inputs:
            each.fill(batch, width)
        self.cpu.embed(self._embedding, batch.tokens, self._hidden[: len(batch.tokens)].numpy())
        return width

    def _measure_shares(self, cache: LatentCache) -> None:
        """What part of the experts is sent for prompts."""
        sent = [SentExperts(stage.device, stage.sendable) for stage in self._stages]
        if sum(each.file_bytes for each in sent) > psutil.virtual_memory().available:
            return  # what would be read from the disk for every chunk is no faster
        for stage, each in zip(self._stages, sent, strict=True):
            with stage.device.work():
                stage.shares.measure(each, partial(self._excerpt, stage, cache))

    def _excerpt(self, stage: Stage, cache: LatentCache, n: int) -> Excerpt:
        batch = self._some_prompt(n, cache)
        return stage.excerpt(batch, self._fill(batch, cache, [stage.inputs]), cache)

    def _some_prompt(self, n: int, cache: LatentCache) -> Batch:
        """n random tokens, one wanted, all pages of which are the first."""
        tokens = np.random.default_rng(0).integers(0, self.config.vocab_size, n).tolist()
        pages = [0] * -(-self._positions // cache.page_size)
        starts = range(0, n, self._positions)
        texts = [tokens[start : start + self._positions] for start in starts]
        return Batch.of([Piece(text, 0, pages, text is texts[-1]) for text in texts], cache.page_size)

    def _read_once(self, cache: LatentCache) -> None:
        """A step as large as any, so that no user's is the first for which memory is taken. Layers of which
        nothing is sent are left out: they may take the CPU minutes."""
        batch = self._some_prompt(self._rows, cache)
        with self._idle():
            self._prompt(batch, cache, self._prompts(batch)[1])

    @contextmanager
    def _idle(self) -> Iterator[None]:
        """No experts are computed here that are the CPU's alone."""
        for stage in self._stages:
            stage.exchange.idle = True
        try:
            yield
        finally:
            for stage in self._stages:
                stage.exchange.idle = False

    @contextmanager
    def _first_pages_kept(self, cache: LatentCache) -> Iterator[None]:
        """The first page of every layer, which is written to here, is afterwards what it was."""
        first_pages = [part[:, 0].clone() for part in cache.parts]
        self._synchronize()
        yield
        for part, page in zip(cache.parts, first_pages, strict=True):
            part[:, 0] = page
        self._synchronize()

    def _warm_up(self, cache: LatentCache) -> None:
        """Compiles and allocates all that steps of drawn rows will need, and captures those of few."""
        sizes = range(1, min(self._logit_rows, CAPTURED_ROWS) + 1)
        waits = any(stage.waits for stage in self._stages)

        def batch(n: int) -> Batch:
            wanted = [Piece([0], 0, [0], 1)]  # by a chunk of a prompt, most often one row
            return Batch.of(wanted + [Piece([0], 0, [0], 0)] * (n - 1), cache.page_size)

        with self._idle():
            self._prompt(batch(self._rows), cache, [(0, slice(0, self._rows))])
            # Scratch memory is taken by the largest.
            for n, width, parts in product(reversed(sizes), reversed(self._widths), (1, 2)):
                if parts == 1 or (waits and n > 1):
                    self._fill(batch(n), cache, [stage.drawn_inputs for stage in self._stages])
                    self._drawn_steps(n, width, cache, parts)
                    self._synchronize()
        for stage in self._stages:
            with stage.device.work():
                stage.rehearse()
        # What would be read from the disk for every step takes as long in any way.
        mapped = sum(stage.mapped_bytes for stage in self._stages)
        measured = waits and mapped <= psutil.virtual_memory().available
        if measured:
            self._measure_fetching(sizes, cache)
        parts_of = self._measure_parts(sizes, cache) if measured else dict.fromkeys(sizes, 1)
        for n, width in product(sizes, self._widths):
            self._capture(n, width, parts_of[n], cache)

    def _measure_fetching(self, sizes: Sequence[int], cache: LatentCache) -> None:
        """How many of a drawn row's experts the devices fetch: as many as make steps of one row and of four,
        both taken alike, the fastest."""
        most = max(stage.fetching.most for stage in self._stages)
        seconds = {}
        for count in range(most + 1) if most else ():
            self._fetch(count, sizes, cache)
            seconds[count] = math.prod(self._seconds(n, 1, cache) for n in _FETCHING_ROWS if n in sizes)
        if seconds:
            count = min(seconds, key=seconds.__getitem__)
            self._fetch(count, sizes, cache)
            log.info("Of each drawn token's experts in memory the GPU fetches and computes %d.", count)

    def _fetch(self, count: int, sizes: Sequence[int], cache: LatentCache) -> None:
        """The devices fetch `count` of a row's experts from now on; steps have run once with it."""
        for stage in self._stages:
            stage.fetching.count = min(count, stage.fetching.most)
            stage.forget_captures()
        with self._idle():
            for n in reversed(sizes):
                batch = self._random_batch(n, cache, 0)
                self._fill(batch, cache, [stage.drawn_inputs for stage in self._stages])
                self._drawn_steps(n, self._widths[0], cache)
                self._synchronize()

    def _measure_parts(self, sizes: Sequence[int], cache: LatentCache) -> dict[int, int]:
        """In how many parts steps of n drawn rows are the faster, found for powers of two."""
        found = {1: 1}
        for n in sizes:
            power = 1 << n.bit_length() - 1
            if power not in found:
                seconds = self._seconds_in_parts(power, cache)
                found[power] = min(seconds, key=seconds.__getitem__)
        return {n: found[1 << n.bit_length() - 1] for n in sizes}

    def _seconds_in_parts(self, n: int, cache: LatentCache) -> dict[int, float]:
        """Seconds of a captured step of n rows, by the number of its parts."""
        return {parts: self._seconds(n, parts, cache) for parts in (1, 2)}

    def _seconds(self, n: int, parts: int, cache: LatentCache) -> float:
        """Seconds of a captured step of n rows; the median of five, each of other tokens, or the experts of
        a small model would stay in the processor's caches."""
        self._capture(n, self._widths[0], parts, cache)
        taken = []
        for seed in range(5):
            batch = self._random_batch(n, cache, seed)
            start = time.perf_counter()
            self._drawn(batch, cache)
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    def _random_batch(self, n: int, cache: LatentCache, seed: int) -> Batch:
        """n drawn rows at the start of texts, all in the cache's first page."""
        tokens = np.random.default_rng(seed).integers(0, self.config.vocab_size, n).tolist()
        return Batch.of([Piece([token], 0, [0], 1, prompt=0) for token in tokens], cache.page_size)

    def _capture(self, n: int, width: int, parts: int, cache: LatentCache) -> None:
        for stage in self._stages:
            with stage.device.work():
                stage.capture(n, width, parts, cache)


@contextmanager
def _planned(*devices: Device) -> Iterator[None]:
    """What is done here takes memory that was planned for: raises SettingsError where it is not there."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise SettingsError(
            f"The memory of {', '.join(str(device.device) for device in devices)} does not hold what was"
            " planned for it: stop other programs that use it, or lower --vram or --context."
        ) from error
