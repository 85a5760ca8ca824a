"""Log probabilities of a step's rows, against float64 and against each row alone."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from ktd.engine.logprobs import LEAST, score_rows
from ktd.types import Score
from ktd_kernels import Cpu

F32 = npt.NDArray[np.float32]
CPU = Cpu(threads=2)


def scores(logits: F32, wanted: list[int | None], token: int = 3) -> list[Score | None]:
    return [row and row.of(token) for row in score_rows(CPU, logits, wanted, [False] * len(logits))]


@pytest.mark.parametrize("vocab", [7, 64, 1281, 129_280])
def test_values_and_order(vocab: int) -> None:
    logits = (np.random.default_rng(vocab).standard_normal((5, vocab)) * 6).astype(np.float32)
    logits[:, 1::5] = logits[:, :1]  # many equals
    given = logits.copy()
    exact = logits.astype(np.float64)
    exact -= exact.max(axis=1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    wanted: list[int | None] = [20, None, 0, 1, 5]
    for row, count, score in zip(exact, wanted, scores(logits, wanted), strict=True):
        if count is None:
            assert score is None
            continue
        assert score is not None
        assert score.logprob == pytest.approx(row[3], abs=2e-6)
        likeliest = np.argsort(-row, kind="stable")[:count].tolist()
        assert [token for token, _ in score.top] == likeliest
        assert [value for _, value in score.top] == pytest.approx(row[likeliest], abs=2e-6)
    assert np.array_equal(logits, given)


@pytest.mark.parametrize("vocab", [100, 1282, 129_280])
def test_a_row_has_the_same_bits_in_any_company(vocab: int) -> None:
    logits = (np.random.default_rng(1).standard_normal((9, vocab)) * 4).astype(np.float32)
    together = scores(logits, [20] * 9)
    for count in (1, 2, 3, 8):
        assert scores(logits[:count], [20] * count) == together[:count]
    for row in range(9):
        assert scores(logits[row : row + 1], [20]) == together[row : row + 1]


def test_a_row_without_numbers_harms_no_other() -> None:
    logits = np.zeros((3, 500), np.float32)
    logits[0] = np.nan
    logits[1] = np.inf
    logits[2, 7] = -np.inf
    *_, last = score_rows(CPU, logits, [20, 20, 2], [False] * 3)
    assert last is not None
    assert last.of(7).logprob == LEAST
    assert [token for token, _ in last.of(7).top] == [0, 1]


def test_a_row_without_numbers_may_be_drawn_from_once_it_is_masked() -> None:
    """Its scores must still be numbers: JSON has no NaN."""
    logits = np.zeros((1, 500), np.float32)
    logits[0, 3] = np.nan
    (score,) = scores(logits, [2], token=5)
    assert score is not None
    assert [score.logprob, *(value for _, value in score.top)] == [LEAST] * 3


def test_rows_that_are_adjusted_are_scored_as_the_model_gave_them() -> None:
    logits = (np.random.default_rng(3).standard_normal((2, 700))).astype(np.float32)
    want = scores(logits.copy(), [4, 4])
    rows = score_rows(CPU, logits, [4, 4], [True, False])
    logits[0] = -np.inf
    assert [row and row.of(3) for row in rows] == want
    assert rows[1] is not None
    logits[1, 3] += 1  # not copied
    assert rows[1].of(3) != want[1]


def test_nobody_asked() -> None:
    assert score_rows(CPU, np.zeros((2, 5), np.float32), [None, None], [False] * 2) == [None, None]
    assert score_rows(CPU, np.zeros((0, 5), np.float32), [], []) == []
