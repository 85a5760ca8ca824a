"""Calls of latent attention, and how far from the reference their results may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ktd_kernels import reference
from ktd_kernels.reference.attention import from_bf16

U = 2.0**-24
# Rounding errors of a chain count as independent, at most U of each partial sum (Higham and Mary 2019):
# six deviations cover the millions of chains that these tests compare.
LAMBDA = 6.0
WILD = np.iinfo(np.int32).max
F32 = NDArray[np.float32]


class Attends(Protocol):
    """What a test needs of a Cpu."""

    def mla_attention(self, *arguments: Any) -> None: ...


@dataclass(frozen=True)
class Case:
    """Arguments of one call; `q` holds latent and rope queries side by side."""

    q: F32
    r: int
    cache: F32 | NDArray[np.uint16]
    page_table: NDArray[np.int32]
    seq_of_row: NDArray[np.int32]
    context: NDArray[np.int32]
    scale: float

    def run(self, cpu: Attends, rows: slice | list[int] = slice(None)) -> F32:
        q = np.ascontiguousarray(self.q[rows])
        out = np.full((*q.shape[:2], self.r), np.nan, np.float32)
        cpu.mla_attention(
            q[:, :, : self.r],
            q[:, :, self.r :],
            self.cache,
            self.page_table,
            np.ascontiguousarray(self.seq_of_row[rows]),
            np.ascontiguousarray(self.context[rows]),
            self.scale,
            out,
        )
        return out

    def keys(self, row: int) -> NDArray[np.float64]:
        tokens = np.arange(self.context[row])
        size = self.cache.shape[1]
        stored = self.cache[self.page_table[self.seq_of_row[row], tokens // size], tokens % size]
        return (from_bf16(stored) if stored.dtype == np.uint16 else stored).astype(np.float64)

    def reference(self) -> NDArray[np.float64]:
        q = self.q
        arguments = (self.cache, self.page_table, self.seq_of_row, self.context, self.scale)
        return reference.mla_attention(q[:, :, : self.r], q[:, :, self.r :], *arguments)

    def bound(self, row: int, head: int) -> NDArray[np.float64]:
        """How far the kernel may be off, per output value."""
        keys = self.keys(row)
        partial = np.cumsum(keys * self.q[row, head].astype(np.float64), axis=1) * self.scale
        # A score: its chain of multiply-adds, the rounded query, and the subtraction of the maximum.
        score_error = LAMBDA * U * np.sqrt((partial**2).sum(1)) + 4 * U * np.abs(partial).max(1)
        p = np.exp(partial[:, -1] - partial[:, -1].max())
        p /= p.sum()
        # Weights err by their scores and the exponential (2e-7); both sums run over tokens, tiles, chunks.
        relative = 2 * score_error + 4e-7 + LAMBDA * U * (np.sqrt(len(p)) + 40)
        error: NDArray[np.float64] = (p * relative) @ np.abs(keys[:, : self.r])
        return error + np.abs(p @ keys[:, : self.r]) * float(p @ (2 * score_error))


def make_case(
    contexts: list[list[int]], heads: int, r: int, dr: int, page_size: int, *, bf16: bool, seed: int = 0
) -> Case:
    """Sequences with rows of the given contexts, on shuffled pages; what no row may read is NaN or wild."""
    rng = np.random.default_rng(seed)
    used = [-(-max(rows) // page_size) for rows in contexts]
    max_pages, pages = max(used) + 2, sum(used) + 3
    cache = np.full((pages, page_size, r + dr), np.nan, np.float32)
    table = np.full((len(contexts), max_pages), WILD, np.int32)
    order = rng.permutation(pages).astype(np.int32)
    for sequence, rows in enumerate(contexts):
        table[sequence, : used[sequence]], order = order[: used[sequence]], order[used[sequence] :]
        for token in range(max(rows)):
            values = rng.standard_normal(r + dr, np.float32)
            cache[table[sequence, token // page_size], token % page_size] = values
    flat = [(sequence, context) for sequence, rows in enumerate(contexts) for context in rows]
    return Case(
        rng.standard_normal((len(flat), heads, r + dr), np.float32),
        r,
        reference.to_bf16(cache) if bf16 else cache,
        table,
        np.array([sequence for sequence, _ in flat], np.int32),
        np.array([context for _, context in flat], np.int32),
        1.5 / np.sqrt(r + dr),
    )


def check(case: Case, out: F32) -> None:
    want = case.reference()
    assert np.isfinite(out).all()
    for row in range(out.shape[0]):
        if case.context[row] == 0:
            assert not out[row].any()
            continue
        for head in range(out.shape[1]):
            error = np.abs(out[row, head] - want[row, head])
            assert (error <= case.bound(row, head)).all(), (row, head, error.max())
