"""Log probabilities of a step's rows, for the requests that want them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ktd.types import Score
from ktd_kernels import Cpu

F32 = npt.NDArray[np.float32]

# What OpenAI writes for a token that is as good as impossible: JSON has no infinity.
LEAST = -9999.0


class RowScores:
    """One row's logits as the model gave them [vocab], the logarithm of their sum, and the likeliest."""

    def __init__(self, logits: F32, total: float, top: Sequence[tuple[int, float]]) -> None:
        self._logits, self._total, self._top = logits, total, top

    def of(self, token: int) -> Score:
        """The score of `token`, drawn from this row."""
        return Score(_logarithms(self._logits[token : token + 1], self._total)[0], self._top)


def score_rows(
    cpu: Cpu, logits: F32, wanted: Sequence[int | None], adjusted: Sequence[bool]
) -> list[RowScores | None]:
    """Scores of the rows of `logits` [rows, vocab] that want some; `wanted`: how many of the likeliest.

    All rows of a step at once, and a row's values are the same bit for bit whatever the others are. The
    scores refer to `logits`; those rows that are `adjusted` before they are read are copied. Of equally
    likely tokens the lowest id comes first.
    """
    scores: list[RowScores | None] = [None] * len(wanted)
    rows = [row for row, count in enumerate(wanted) if count is not None]
    if not rows:
        return scores
    most = min(max(wanted[row] or 0 for row in rows), logits.shape[1])
    totals = np.empty(len(rows), np.float64)
    ids = np.empty((len(rows), most), np.int32)
    cpu.score(logits, np.array(rows, np.int32), totals, ids)
    for row, total, own_ids in zip(rows, totals.tolist(), ids, strict=True):
        own = logits[row].copy() if adjusted[row] else logits[row]
        top = own_ids[: wanted[row]]
        pairs = list(zip(top.tolist(), _logarithms(own[top], total), strict=True))
        scores[row] = RowScores(own, total, pairs)
    return scores


def _logarithms(logits: F32, total: float) -> list[float]:
    """Log probabilities of `logits`, as float32, in a row whose exponentials' sum has the logarithm
    `total`; LEAST where that is none."""
    values: list[float] = np.fmax(logits - np.float64(total), LEAST).astype(np.float32).tolist()
    return values
