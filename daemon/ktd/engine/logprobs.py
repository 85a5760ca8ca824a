"""Log probabilities of a step's rows, for the requests that want them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ktd.types import Score

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

# What OpenAI writes for a token that is as good as impossible: JSON has no infinity.
LEAST = -9999.0
_GROUP = 64  # tokens of which only the likeliest is looked at first


class RowScores:
    """One row's logits as the model gave them [vocab], the logarithm of their sum, and the likeliest."""

    def __init__(self, logits: F32, total: np.float64, top: Sequence[tuple[int, float]]) -> None:
        self._logits, self._total, self._top = logits, total, top

    def of(self, token: int) -> Score:
        """The score of `token`, drawn from this row."""
        return Score(float(_logarithm(self._logits[token : token + 1], self._total)[0]), self._top)


def score_rows(logits: F32, wanted: Sequence[int | None]) -> list[RowScores | None]:
    """Scores of the rows of `logits` [rows, vocab] that want some; `wanted`: how many of the likeliest.

    All rows of a step at once, and a row's values are the same bit for bit whatever the others are. `logits`
    are copied, not kept. Of equally likely tokens the lowest id comes first.
    """
    rows = [row for row, count in enumerate(wanted) if count is not None]
    scores: list[RowScores | None] = [None] * len(wanted)
    if not rows:
        return scores
    own = logits[rows]
    with np.errstate(invalid="ignore"):  # a row without numbers is its sampler's to refuse
        largest = own.max(axis=1, keepdims=True)
        weights = own - largest
        np.exp(weights, out=weights)
        totals = largest[:, 0] + np.log(weights.sum(axis=1, dtype=np.float64))
    counts = [wanted[row] or 0 for row in rows]
    for row, own_row, total, top in zip(rows, own, totals, _tops(own, totals, counts), strict=True):
        scores[row] = RowScores(own_row, total, top)
    return scores


def _tops(logits: F32, totals: F64, counts: Sequence[int]) -> list[list[tuple[int, float]]]:
    """Of each row the (id, log probability) of its `counts` likeliest tokens, likeliest first."""
    most = max(counts)
    if not most:
        return [[]] * len(counts)
    places = np.flatnonzero(logits >= _bounds(logits, most)[:, None])  # much faster than nonzero
    rows, ids = np.divmod(places, logits.shape[1])
    values = logits[rows, ids]
    order = np.lexsort((-values, rows))  # stable: equal ones stay by id
    rows, ids, values = rows[order], ids[order], _logarithm(values[order], totals[rows[order]])
    starts = np.searchsorted(rows, np.arange(len(counts) + 1))
    tops = []
    for row, count in enumerate(counts):
        first = slice(starts[row], min(starts[row] + count, starts[row + 1]))
        tops.append(list(zip(ids[first].tolist(), values[first].tolist(), strict=True)))
    return tops


def _bounds(logits: F32, count: int) -> F32:
    """For each row a value that at least `count` tokens reach, and few more: sorts no vocabulary.

    Tokens are put in groups by their ids; as many as `count` groups have a token that is not below the
    `count`th of their largest.
    """
    groups = logits.shape[1] // _GROUP
    if groups < count:
        return np.full(len(logits), -np.inf, np.float32)
    grouped = logits[:, : groups * _GROUP].reshape(len(logits), _GROUP, groups)
    bounds: F32 = np.partition(grouped.max(axis=1), groups - count, axis=1)[:, groups - count]
    return bounds


def _logarithm(logits: F32, totals: F64 | np.float64) -> F32:
    """Log probabilities of `logits` in rows whose exponentials' sum has the logarithm `totals`."""
    return np.maximum(logits - totals, LEAST).astype(np.float32)
