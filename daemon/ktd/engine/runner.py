"""A step's work becomes one call of the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ktd.cache import LatentCache
from ktd.model import Batch, Model, Piece, Tick
from ktd.sched import Work


class Runner:
    """Joins the model with the cache it writes to."""

    def __init__(self, model: Model, cache: LatentCache) -> None:
        self._model = model
        self._cache = cache

    def run(self, work: Sequence[Work], tick: Tick | None) -> npt.NDArray[np.float32]:
        """Logits [number of work items that draw, vocab], in their order; overwritten by the next run."""
        pieces = [
            Piece(
                tokens=item.sequence.tokens[item.start : item.start + item.count],
                start=item.start,
                pages=item.sequence.pages,
                logits=int(item.draws),
                prompt=item.sequence.prompt_tokens,
            )
            for item in work
        ]
        return self._model.forward(Batch.of(pieces, self._cache.page_size), self._cache, tick)
