"""What is done once when a model is loaded, before its first step: all that steps need is compiled, allocated
and captured, and it is measured in which way they are the fastest."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product

import numpy as np
import psutil

from ktd.model.batch import Batch, Piece
from ktd.model.pipeline import Pipeline
from ktd.model.placement import CAPTURED_ROWS
from ktd.model.shares import Excerpt
from ktd.model.stage import Stage
from ktd.model.streaming import SentExperts

log = logging.getLogger(__name__)
# Drawn rows of the steps by which it is found how many experts a device fetches.
_FETCHING_ROWS = (1, 4)


class Rehearsal:
    """Of a pipeline that has reserved."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline, self._stages = pipeline, pipeline.stages
        self._sizes = range(1, min(pipeline.logit_rows, CAPTURED_ROWS) + 1)
        self._waits = any(stage.waits for stage in self._stages)

    def run(self) -> None:
        """Raises torch.OutOfMemoryError where a device does not hold what steps need."""
        with self._first_pages_kept():
            self._warm_up()
            self._capture_all()
            self._measure_shares()
            for stage in self._stages:
                stage.device.settle()
            self._read_once()

    @contextmanager
    def _first_pages_kept(self) -> Iterator[None]:
        """The first page of every layer, which is written to here, is afterwards what it was."""
        cached = self._pipeline.cache.parts
        first_pages = [part[:, 0].clone() for part in cached]
        self._pipeline.synchronize()
        yield
        for part, page in zip(cached, first_pages, strict=True):
            part[:, 0] = page
        self._pipeline.synchronize()

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

    def _warm_up(self) -> None:
        """Compiles and allocates all that steps of drawn rows will need."""
        page_size = self._pipeline.cache.page_size

        def batch(n: int) -> Batch:
            wanted = [Piece([0], 0, [0], 1)]  # by a chunk of a prompt, most often one row
            return Batch.of(wanted + [Piece([0], 0, [0], 0)] * (n - 1), page_size)

        with self._idle():
            self._pipeline.step(batch(self._pipeline.rows))
            # Scratch memory is taken by the largest.
            for n, width, parts in product(reversed(self._sizes), reversed(self._pipeline.widths), (1, 2)):
                if parts == 1 or (self._waits and n > 1):
                    self._pipeline.drawn(batch(n), width, parts)
        for stage in self._stages:
            with stage.device.work():
                stage.rehearse()

    def _capture_all(self) -> None:
        """Steps of few drawn rows, in the way that is measured to be the fastest."""
        parts_of = dict.fromkeys(self._sizes, 1)
        # What would be read from the disk for every step takes as long in any way.
        mapped = sum(stage.mapped_bytes for stage in self._stages)
        if self._waits and mapped <= psutil.virtual_memory().available:
            self._measure_fetching()
            parts_of = self._measure_parts()
        for n, width in product(self._sizes, self._pipeline.widths):
            self._capture(n, width, parts_of[n])

    def _measure_fetching(self) -> None:
        """How many of a drawn row's experts the devices fetch: as many as make steps of one row and of four,
        both taken alike, the fastest."""
        most = max(stage.fetching.most for stage in self._stages)
        seconds = {}
        for count in range(most + 1) if most else ():
            self._fetch(count)
            seconds[count] = math.prod(self._seconds(n, 1) for n in _FETCHING_ROWS if n in self._sizes)
        if seconds:
            count = min(seconds, key=seconds.__getitem__)
            self._fetch(count)
            log.info("Of each drawn token's experts in memory the GPU fetches and computes %d.", count)

    def _fetch(self, count: int) -> None:
        """The devices fetch `count` of a row's experts from now on; steps have run once with it."""
        for stage in self._stages:
            stage.fetching.count = min(count, stage.fetching.most)
            stage.forget_captures()
        with self._idle():
            for n in reversed(self._sizes):
                self._pipeline.drawn(self._drawn_batch(n, 0))

    def _measure_parts(self) -> dict[int, int]:
        """In how many parts steps of n drawn rows are the faster, found for powers of two."""
        found = {1: 1}
        for n in self._sizes:
            power = 1 << n.bit_length() - 1
            if power not in found:
                seconds = self._seconds_in_parts(power)
                found[power] = min(seconds, key=seconds.__getitem__)
        return {n: found[1 << n.bit_length() - 1] for n in self._sizes}

    def _seconds_in_parts(self, n: int) -> dict[int, float]:
        """Seconds of a captured step of n rows, by the number of its parts."""
        return {parts: self._seconds(n, parts) for parts in (1, 2)}

    def _seconds(self, n: int, parts: int) -> float:
        """Seconds of a captured step of n rows; the median of five, each of other tokens, or the experts of
        a small model would stay in the processor's caches."""
        self._capture(n, self._pipeline.widths[0], parts)
        taken = []
        for seed in range(5):
            batch = self._drawn_batch(n, seed)
            start = time.perf_counter()
            self._pipeline.drawn(batch)
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)

    def _drawn_batch(self, n: int, seed: int) -> Batch:
        """n drawn rows at the start of texts, all in the cache's first page."""
        pieces = [Piece([token], 0, [0], 1, prompt=0) for token in self._random_tokens(n, seed)]
        return Batch.of(pieces, self._pipeline.cache.page_size)

    def _capture(self, n: int, width: int, parts: int) -> None:
        for stage in self._stages:
            with stage.device.work():
                stage.capture(n, width, parts, self._pipeline.cache)

    def _measure_shares(self) -> None:
        """What part of the experts is sent for prompts."""
        sent = [SentExperts(stage.device, stage.sendable) for stage in self._stages]
        if sum(each.file_bytes for each in sent) > psutil.virtual_memory().available:
            return  # what would be read from the disk for every chunk is no faster
        for stage, each in zip(self._stages, sent, strict=True):
            with stage.device.work():
                stage.shares.measure(each, partial(self._excerpt, stage))

    def _excerpt(self, stage: Stage, n: int) -> Excerpt:
        return self._pipeline.excerpt(stage, self._prompt_batch(n))

    def _read_once(self) -> None:
        """A step as large as any, so that no user's is the first for which memory is taken. Layers of which
        nothing is sent are left out: they may take the CPU minutes."""
        with self._idle():
            self._pipeline.step(self._prompt_batch(self._pipeline.rows))

    def _prompt_batch(self, n: int) -> Batch:
        """n tokens of prompts, one wanted, all pages of which are the first."""
        tokens, positions = self._random_tokens(n, 0), self._pipeline.positions
        page_size = self._pipeline.cache.page_size
        pages = [0] * -(-positions // page_size)
        texts = [tokens[start : start + positions] for start in range(0, n, positions)]
        return Batch.of([Piece(text, 0, pages, text is texts[-1]) for text in texts], page_size)

    def _random_tokens(self, n: int, seed: int) -> list[int]:
        tokens: list[int] = (
            np.random.default_rng(seed).integers(0, self._pipeline.config.vocab_size, n).tolist()
        )
        return tokens
