"""Steps through the stages of a model, one stage behind the other, from tokens to logits.

A step's rows fall in two kinds that are computed one after the other. Rows of prompts run op by op, in the
arithmetic for many rows. Rows that the model has drawn, at most 64 at a time, run in the arithmetic in which
a row's bits do not depend on its company, as one captured graph for each number of rows and each stage.

Several drawn rows may come in two parts, so that both sides are busy: while the CPU computes the experts of
one, the GPU goes on with the other. Dense weights are then read twice, and so are experts that both parts
chose: it is measured when the model is loaded whether that pays.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from ktd.cache import LatentCache
from ktd.errors import SettingsError
from ktd.model.batch import Batch
from ktd.model.config import ModelConfig
from ktd.model.deepseek import Tick
from ktd.model.device import Device
from ktd.model.inputs import Inputs, table_width
from ktd.model.ops import Matrix
from ktd.model.placement import DRAWN_ROWS
from ktd.model.shares import Excerpt
from ktd.model.stage import Stage
from ktd.model.streaming import Span
from ktd_kernels import Cpu

F32 = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
# Tokens of context for which attention is launched: each step takes the least that holds its own.
_CONTEXTS = (4096, 16384, 65536)


class Pipeline:
    """Steps of up to `rows` rows over `cache`, of which `logit_rows` want logits, as the last `reserve` had
    it. Page tables come in `widths`, ascending, in pages."""

    cache: LatentCache
    widths: list[int]

    def __init__(
        self, config: ModelConfig, cpu: Cpu, embedding: Matrix, stages: Sequence[Stage], positions: int
    ) -> None:
        """For sequences of up to `positions` tokens."""
        self.config, self.stages, self.positions = config, stages, positions
        self.rows = self.logit_rows = 0
        self._cpu, self._embedding = cpu, embedding

    def reserve(self, rows: int, logit_rows: int, cache: LatentCache) -> None:
        """Allocates; nothing is captured yet. Raises SettingsError where that does not fit."""
        config, first = self.config, self.stages[0].device
        self.rows, self.logit_rows, self.cache = rows, logit_rows, cache
        pages = -(-self.positions // cache.page_size)
        self.widths = [*(c // cache.page_size for c in _CONTEXTS if c < self.positions), pages]
        self._hidden = first.pinned((rows, config.hidden))
        self._logits = first.pinned((logit_rows, config.vocab_size))
        for stage in self.stages:
            with planned(stage.device), stage.device.work():
                stage.reserve(rows, logit_rows, pages, self._hidden, self._logits)

    def holds(self, batch: Batch, cache: LatentCache) -> bool:
        """Whether the step is one of those that were reserved for."""
        fits = len(batch.tokens) <= self.rows and len(batch.logit_rows) <= self.logit_rows
        return fits and cache is self.cache

    def step(self, batch: Batch, tick: Tick | None = None) -> F32:
        """As `forward` of `ktd.model.Model`, once the devices have done what was asked of them before."""
        wanted = len(batch.logit_rows)
        parts = []
        drawn = np.flatnonzero(batch.positions >= batch.prompt)
        if len(drawn) < len(batch.tokens):
            reading, spans = self._prompts(batch)
            part = batch.take(reading)
            parts.append((reading[part.logit_rows], self._prompt(part, spans, tick)))
        most = min(DRAWN_ROWS, self.logit_rows)
        for start in range(0, len(drawn), most):
            rows = drawn[start : start + most]
            part = batch.take(rows) if len(rows) < len(batch.tokens) else batch
            logits = self.drawn(part)
            if len(part.logit_rows) == wanted == len(rows):
                return logits
            parts.append((rows[part.logit_rows], logits[part.logit_rows]))
        result = np.empty((wanted, self.config.vocab_size), np.float32)
        for rows, logits in parts:
            result[np.searchsorted(batch.logit_rows, rows)] = logits
        return result

    def drawn(self, batch: Batch, width: int | None = None, parts: int = 1) -> F32:
        """Logits of all rows of a batch of drawn tokens; overwritten by the next call. `width` is that of the
        page table, None: the least that will do; `parts` is for steps that are not captured."""
        n = len(batch.tokens)
        width = self._fill(batch, [stage.drawn_inputs for stage in self.stages], width)
        for stage in self.stages:
            with stage.turn():
                stage.drawn(n, width, self.cache, parts)
        self.synchronize()
        logits: F32 = self._logits[:n].numpy()
        return logits

    def excerpt(self, stage: Stage, batch: Batch) -> Excerpt:
        """What some layers of a stage do in the step of a prompt; good until the next step."""
        return stage.excerpt(batch, self._fill(batch, [stage.inputs]), self.cache)

    def synchronize(self) -> None:
        """Waits for every device, and raises what went wrong on one."""
        for stage in self.stages:
            stage.device.synchronize()

    def _prompts(self, batch: Batch) -> tuple[Ids, list[Span]]:
        """Rows of prompts, those of one number by `Shares.of` side by side."""
        sizes = np.max([stage.shares.of(batch) for stage in self.stages], axis=0)
        reading = np.flatnonzero(batch.positions < batch.prompt)
        reading = reading[np.argsort(-sizes[reading], kind="stable")]
        numbers, starts = np.unique(-sizes[reading], return_index=True)
        bounds = pairwise((*starts.tolist(), len(reading)))
        return reading, [(-n, slice(*span)) for n, span in zip(numbers.tolist(), bounds, strict=True)]

    def _prompt(self, batch: Batch, spans: Sequence[Span], tick: Tick | None) -> F32:
        """Logits of the wanted rows of a batch of prompts, copied."""
        width = self._fill(batch, [stage.inputs for stage in self.stages])
        for stage in self.stages:
            with stage.turn():
                stage.prompt(batch, width, self.cache, spans, tick)
        self.synchronize()
        for stage in self.stages:
            stage.check()
        copied: F32 = self._logits[: len(batch.logit_rows)].numpy().copy()
        return copied

    def _fill(self, batch: Batch, inputs: Sequence[Inputs], width: int | None = None) -> int:
        """Writes the batch to the host's inputs; returns the width of its page table."""
        width = width or table_width(batch, self.cache.page_size, self.widths)
        for each in inputs:
            each.fill(batch, width)
        self._cpu.embed(self._embedding, batch.tokens, self._hidden[: len(batch.tokens)].numpy())
        return width


@contextmanager
def planned(*devices: Device) -> Iterator[None]:
    """What is done here takes memory that was planned for: raises SettingsError where it is not there."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise SettingsError(
            f"The memory of {', '.join(str(device.device) for device in devices)} does not hold what was"
            " planned for it: stop other programs that use it, or lower --vram or --context."
        ) from error
